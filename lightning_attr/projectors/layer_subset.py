"""Projections of some layers only: what TracIn and its kin do to large models."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any, ClassVar

from lightning_attr.arguments.messages import argument_message
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors.base import Projection, Projector, check_projector


class LayerSubset(Projector):
    """Projects the gradients of some layers, and leaves those of the others uncomputed.

    For every method on stored features. As the backward pass still goes down to the lowest layer that is wanted, the
    last layers cost least.

    Args:
        projector: of the layers wanted.
        layers: shell-style patterns of parameter names or module paths; ``*`` goes across dots, and a module stands for
            all parameters below it.

    Raises:
        ValueError: if there is no pattern.

    Example:
        >>> from lightning_attr.projectors import IdentityProjector
        >>> layout = ParameterLayout({"body.0.weight": (4, 4), "head.weight": (3, 4), "head.bias": (3,)})
        >>> projection = LayerSubset(IdentityProjector(), ["head"]).bind(layout, "final")
        >>> projection.dim, sorted(projection.names)
        (15, ['head.bias', 'head.weight'])
    """

    kind: ClassVar[str] = "layer_subset"

    def __init__(self, projector: Projector, layers: Sequence[str]) -> None:
        check_projector(self, projector)
        listed = not isinstance(layers, str) and isinstance(layers, Sequence)
        if not (listed and layers and all(isinstance(layer, str) and layer for layer in layers)):
            raise ValueError(argument_message(self, "layers", "a list of at least one pattern of layer names", layers))
        super().__init__(projector.proj_dim, projector.seed)
        self.projector = projector
        self.layers = list(layers)

    def bind(self, layout: ParameterLayout, snapshot: str) -> Projection:
        """Bind the projector to the parameters wanted.

        Args:
            layout: all parameters.
            snapshot: key of the snapshot.

        Returns:
            The linear map of the parameters wanted.

        Raises:
            ValueError: if a pattern matches none.
        """
        matching = {pattern: {n for n in layout.shapes if _matches(n, pattern)} for pattern in self.layers}
        for pattern, names in matching.items():
            if not names:
                modules = {name.rpartition(".")[0] or name for name in layout.shapes}
                raise ValueError(
                    f"Expected every pattern of argument `layers` to match trainable parameters, but {pattern!r} "
                    f"matches none. The layers are {', '.join(f'`{module}`' for module in sorted(modules))}."
                )
        wanted = frozenset().union(*matching.values())
        shapes = {name: shape for name, shape in layout.shapes.items() if name in wanted}
        projection = self.projector.bind(ParameterLayout(shapes), snapshot)
        projection.names = wanted if projection.names is None else projection.names & wanted
        return projection

    @property
    def config(self) -> dict[str, Any]:
        """What a store records: kind, layers and the projector's own ``config``."""
        return {"kind": self.kind, "layers": self.layers, "projector": self.projector.config}


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a parameter, or a module that holds it."""
    paths = accumulate(name.split("."), lambda path, part: f"{path}.{part}")
    return any(fnmatchcase(path, pattern) for path in paths)
