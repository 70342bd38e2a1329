r"""Maps that put an optimizer's view of the gradient before a projection: :math:`P D^{1/2} g`, and Adam's direction."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attr.gradients.factored import ParameterGradient, materialise
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.optimizer_state import AdamMoments
from lightning_attr.projectors.base import Projection, flat_rows, flat_slots
from lightning_attr.projectors.learned import check_not_learned


class ScaledProjection(Projection):
    r"""Scales every entry of the gradient before it is projected, :math:`\phi = P (s \odot g)`.

    With :math:`s = D^{1/2}` for training samples and targets alike, inner products of features are those of gradients
    in the metric :math:`D`, and self-influence is a norm. Gradients of each parameter are formed, one at a time.

    Args:
        projection: of the scaled gradients.
        layout: the parameters.
        scales: parameter name -> ``s``, in its shape; one without any is left out, as if ``s`` were zero.

    Raises:
        ValueError: if the projection is learned: it would be learned from gradients that are not scaled.

    Example:
        >>> from lightning_attr.projectors import IdentityProjector
        >>> layout = ParameterLayout({"w": (2,)})
        >>> scaled = ScaledProjection(IdentityProjector().bind(layout, ""), layout, {"w": torch.tensor([1.0, 10.0])})
        >>> features = torch.zeros(1, scaled.dim)
        >>> scaled.accumulate(features, "w", torch.tensor([[3.0, 4.0]]))
        >>> features
        tensor([[ 3., 40.]])
    """

    def __init__(self, projection: Projection, layout: ParameterLayout, scales: Mapping[str, Tensor]) -> None:
        check_not_learned(projection, "gradients in an optimizer's metric")
        super().__init__(projection.dim)
        self.projection = projection
        self.layout = layout
        self.scales = dict(scales)
        self.layers = projection.layers
        self.names = frozenset(scales) if projection.names is None else projection.names & frozenset(scales)

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:  # noqa: D102 - inherited
        if name not in self.scales:
            return
        scale = self.scales[name] = self.scales[name].to(features)  # moved once, then kept
        rows = materialise(gradient, self.layout.shapes[name]).to(features.dtype)
        self.projection.accumulate(features, name, rows * scale)


class AdamDirection(Projection):
    r"""The step that Adam would take for a training sample alone, projected (Xia et al., 2024, LESS, section 3.1).

    .. math::
        \Gamma_i = \frac{m'}{\sqrt{v' + \epsilon}}, \quad m' = \beta_1 m + (1 - \beta_1) \nabla\ell_i, \quad
        v' = \beta_2 v + (1 - \beta_2) (\nabla\ell_i)^2,

    with the moments of the snapshot and, as in the authors' code, :math:`\epsilon` inside the root and no correction of
    the bias. Where parameter groups have learning rates of their own, each parameter's part is scaled by its own over
    their mean. The map is not linear in the gradient, all of which has to be there first, whatever number of parts it
    arrives in: a batch takes ``b * numel`` numbers, so that this is for few parameters, such as those of LoRA.

    ``features`` become :math:`-P \Gamma_i`: the parameters move against :math:`\Gamma_i`. A column ``alignment``
    ``(b,)`` is the cosine between them and the projected gradient of the sample's own model output.

    Args:
        projection: ``P``.
        layout: the parameters.
        moments: parameter name -> its moments; one without any was never updated and does not move.

    Raises:
        ValueError: if the projection is learned: it would be learned from gradients, not from directions.

    Example:
        >>> from lightning_attr.projectors import IdentityProjector
        >>> layout = ParameterLayout({"w": (2,)})
        >>> moments = AdamMoments(torch.zeros(2), torch.zeros(2), 1, (0.0, 0.0), 1e-12, 0.1, "Adam")
        >>> direction = AdamDirection(IdentityProjector().bind(layout, ""), layout, {"w": moments})
        >>> features = torch.zeros(1, direction.dim)
        >>> direction.accumulate(features, "w", torch.tensor([[3.0, -4.0]]))
        >>> direction.finish({"features": features, "out_to_loss": torch.ones(1)})
        {'features': tensor([[ 1., -1.]]), 'out_to_loss': tensor([1.]), 'alignment': tensor([0.9899])}
    """

    def __init__(self, projection: Projection, layout: ParameterLayout, moments: Mapping[str, AdamMoments]) -> None:
        shapes = {n: s for n, s in layout.shapes.items() if projection.names is None or n in projection.names}
        self.whole = ParameterLayout(shapes)
        check_not_learned(projection, "directions of an optimizer")
        super().__init__(self.whole.numel)
        self.names = frozenset(shapes)
        self.projection = projection
        self.moments = dict(moments)
        self.slots = flat_slots(self.whole)
        self.rates = _relative({name: moments[name].learning_rate for name in shapes if name in moments}, self.whole)

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:  # noqa: D102 - inherited
        features[:, self.slots[name]] += flat_rows(gradient, self.whole.shapes[name])

    def finish(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102 - inherited
        gradients = columns["features"]
        out_to_loss = columns["out_to_loss"].to(gradients)[:, None]
        moved, own = (gradients.new_zeros(len(gradients), self.projection.dim) for _ in range(2))
        for name, slot in self.slots.items():
            shape = (len(gradients), *self.whole.shapes[name])
            self.projection.accumulate(own, name, gradients[:, slot].reshape(shape))
            if name in self.moments:
                direction = self._direction(name, -out_to_loss * gradients[:, slot])
                self.projection.accumulate(moved, name, -direction.reshape(shape))
        return {**columns, "features": moved, "alignment": F.cosine_similarity(moved, own)}

    def _direction(self, name: str, gradients: Tensor) -> Tensor:
        """Compute the step, ``(b, size)``, from gradients of the loss."""
        moments = self.moments[name]
        beta1, beta2 = moments.betas
        mean, square = (moment.to(gradients).reshape(-1) for moment in (moments.exp_avg, moments.exp_avg_sq))
        numerator = torch.lerp(gradients, mean, beta1)
        return self.rates[name] * numerator / (torch.lerp(gradients.square(), square, beta2) + moments.eps).sqrt()


def _relative(rates: Mapping[str, float], layout: ParameterLayout) -> dict[str, float]:
    """Learning rates over their mean over all entries; ones where they are equal, or all zero."""
    sizes = {name: math.prod(layout.shapes[name]) for name in rates}
    mean = sum(rates[name] * size for name, size in sizes.items()) / max(1, sum(sizes.values()))
    equal = len(set(rates.values())) < 2 or mean == 0
    return {name: 1.0 if equal else rate / mean for name, rate in rates.items()}
