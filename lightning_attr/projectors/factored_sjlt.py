r"""Two-stage projection: Kronecker to ``side x side`` a layer, then SJLT of all of it.

The first stage costs what the factored projection of Choe et al. (2024, LoGra) costs and never forms a gradient; its
side can be large, because the second, a sparse projection, costs one addition per entry.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from lightning_attr.arguments.checks import check_int
from lightning_attr.gradients.factored import ParameterGradient
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors.base import Projection, Projector, flat_rows
from lightning_attr.projectors.kronecker import Sides
from lightning_attr.projectors.sjlt import Sketch


class FactoredSJLTProjector(Projector):
    r"""Projects each weight matrix to :math:`P_o G P_i^\top`, at most ``side x side``, and their entries by SJLT.

    Vectors, such as biases, go to the second stage as they are. Both stages are unbiased and independent, hence so is
    the whole. With :math:`v` the variance of the first stage and :math:`n` the expected value of
    :math:`|x|^2 |y|^2 + \langle x, y\rangle^2 - 2 \sum_j x_j^2 y_j^2` after it, the variance of an inner product is
    :math:`v + n / k`. One layer's ``(b, side, side)`` exists at a time. On CUDA features repeat to rounding only (see
    :class:`SJLTProjector`).

    Args:
        proj_dim: projection dimension ``k``.
        seed: projections of equal seed, layout and snapshot are equal everywhere.
        side: a matrix dimension larger than this is projected to it; a smaller one is kept as it is.

    Raises:
        ValueError: if ``proj_dim`` or ``side`` is not a positive integer.

    Example:
        >>> import torch
        >>> projection = FactoredSJLTProjector(256, side=8).bind(ParameterLayout({"weight": (20, 30)}), "final")
        >>> features = torch.zeros(1, projection.dim)
        >>> projection.accumulate(features, "weight", torch.ones(1, 20, 30))
        >>> features.shape, bool((features != 0).sum() <= 8 * 8)
        (torch.Size([1, 256]), True)
    """

    kind: ClassVar[str] = "factored_sjlt"

    def __init__(self, proj_dim: int = 2048, seed: int = 0, side: int = 64) -> None:
        super().__init__(proj_dim, seed)
        self.side = check_int(self, "side", side, minimum=1)

    def bind(self, layout: ParameterLayout, snapshot: str) -> Projection:
        """Draw the first stage of every matrix; tiles of the second are drawn when they are first used.

        Args:
            layout: the parameters.
            snapshot: key of the snapshot.

        Returns:
            The linear map.
        """
        return _FactoredSJLTProjection(layout, self.side, Sketch(self.proj_dim, (self.seed, snapshot)))

    @property
    def config(self) -> dict[str, Any]:
        """What a store records of the projector: kind and arguments."""
        return {**super().config, "side": self.side}


class _FactoredSJLTProjection(Projection):
    def __init__(self, layout: ParameterLayout, side: int, sketch: Sketch) -> None:
        super().__init__(sketch.dim)
        self.layout = layout
        self.sketch = sketch
        self.sides = {
            name: Sides.draw(side, shape[0], math.prod(shape[1:]), sketch.key, name)
            for name, shape in layout.shapes.items()
            if len(shape) > 1
        }

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:
        if name in self.sides:
            if isinstance(gradient, Tensor):
                gradient = gradient.reshape(len(features), self.layout.shapes[name][0], -1)
            rows = self.sides[name].project(gradient, features).flatten(1)
        else:
            rows = flat_rows(gradient, self.layout.shapes[name])
        self.sketch.add(features, name, rows)
