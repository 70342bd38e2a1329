r"""A score split by the positions of the training sequence at which the layers of a model were active.

The gradient of a linear map is a sum over positions, :math:`\sum_s \delta_s a_s^\top`, and so is its product with that
of a target. Position :math:`s` is where the layers read and wrote, which is not the same as the token whose loss it is:
attention carries both on; :class:`lightning_attr.modalities.LossTokens` takes losses apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_attr.batches.nested import map_tensors, select_rows
from lightning_attr.features.featurizer import PROBE_SIZE, plan
from lightning_attr.gradients import (
    GatherSum,
    HookedGradients,
    OuterSum,
    ParameterGradient,
    RowSum,
    loop_gradients,
    materialise,
)
from lightning_attr.objectives.mixin import attribution_outputs


@dataclass(frozen=True)
class PositionScores:
    """Scores of ``b`` training samples for ``q`` targets, by position.

    Args:
        positions: share of each position, float, ``(b, q, L)``.
        rest: share of the parameters whose gradients have no positions (norms, pooled layers), float, ``(b, q)``.

    Example:
        >>> PositionScores(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[0.5]])).total()
        tensor([[3.5000]])
    """

    positions: Tensor
    rest: Tensor

    def total(self) -> Tensor:
        """Add up the scores, ``(b, q)``."""
        return self.positions.sum(2) + self.rest


def position_scores(module: Any, batch: Any, targets: Any, length: int | None = None) -> PositionScores:
    r"""Split the product of gradients, :math:`q_i \nabla f_i^\top \nabla f_j`, by the positions of ``i``.

    That is the score of ``GradDot`` without a projection at the module's present weights.

    Args:
        module: with :class:`lightning_attr.AttributionMixin`, in eval mode.
        batch: ``b`` training samples, on the module's device.
        targets: a few targets ``q``, whose gradients have to fit into memory.
        length: as in :func:`position_products`.

    Returns:
        The shares, which add up to the score.

    Raises:
        ValueError: as :func:`position_products`.

    Example:
        >>> from torch import nn
        >>> from lightning_attr import AttributionMixin
        >>> from lightning_attr.outputs import LanguageModel
        >>> class Bigrams(AttributionMixin, nn.Embedding):
        ...     model_output = LanguageModel()
        >>> ids = torch.tensor([[0, 1, 2, 1]])
        >>> position_scores(Bigrams(3, 3).requires_grad_(), (ids, ids), (ids, ids)).positions.shape
        torch.Size([1, 1, 4])
    """
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        count = len(module.functional_output({}, {}, targets))
        weight = module.model_output.out_to_loss(*attribution_outputs(module, batch))
    directions = loop_gradients(lambda p, b: module.functional_output(p, {}, b), params, targets, count)
    found = position_products(module, batch, directions, length)
    return PositionScores(weight[:, None, None] * found.positions, weight[:, None] * found.rest)


def position_products(
    module: Any, batch: Any, directions: Mapping[str, Tensor], length: int | None = None
) -> PositionScores:
    r"""Split products :math:`\nabla f_i^\top v_j` with directions of your own, such as preconditioned gradients.

    Shapes: directions (q, *shape). Returns the shares, which add up to the product.
    """
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, direction in directions.items():
        if name not in params or direction.shape[1:] != params[name].shape:
            raise ValueError(
                f"Expected argument `directions` to hold tensors (q, *shape) of trainable parameters, but got "
                f"{name!r} of shape {tuple(direction.shape)}."
            )
    with torch.enable_grad():  # some steps differentiate
        outputs, labels = map_tensors(attribution_outputs(module, batch), Tensor.detach)
        output = module.model_output.output(outputs, labels)
    if length is None:
        if not isinstance(labels, Tensor) or labels.ndim != 2:
            raise ValueError(
                "Expected argument `length`, the number of positions to split by, as there is not one label a "
                "position: pass the length of the input."
            )
        length = labels.shape[1]
    b, q = len(output), len(next(iter(directions.values())))
    positions, rest = output.new_zeros(b, q, length), output.new_zeros(b, q)

    def add(gradients: Mapping[str, ParameterGradient]) -> None:
        for name, gradient in gradients.items():
            direction = directions[name]
            shares = _shares(gradient, direction, length)
            if shares is None:
                flat = materialise(gradient, tuple(direction.shape[1:])).flatten(1)
                rest.add_(flat.to(rest) @ direction.flatten(1).T.to(rest))
            else:
                positions.add_(shares)

    probe = min(PROBE_SIZE, b)
    chosen = plan(module, select_rows(batch, b, range(probe)), probe, mode="eval")
    hooked = [name for name in chosen.hooked if name in directions]
    HookedGradients(module, hooked, chosen.direct)(lambda: chosen.objective.forward(batch, b)[0], b, add)
    fallback = {name: params[name] for name in chosen.fallback if name in directions}
    if fallback:
        add(loop_gradients(lambda p, one: module.functional_output(p, {}, one), fallback, batch, b))
    return PositionScores(positions, rest)


def _shares(gradient: ParameterGradient, directions: Tensor, length: int) -> Tensor | None:
    """Products of each position's part with each direction, ``(b, q, L)``; None if there are no such parts."""
    if isinstance(gradient, RowSum) and isinstance(gradient.weight, OuterSum):
        rows = gradient.weight.rows
        found = (rows @ directions.flatten(1).T.to(rows)).mT
    elif isinstance(gradient, OuterSum):
        rows, columns = gradient.rows, gradient.columns
        matrices = directions.flatten(2).to(rows)
        found = torch.stack([((rows @ matrix) * columns).sum(2) for matrix in matrices], 1)
    elif isinstance(gradient, GatherSum):
        tables = directions.flatten(2).to(gradient.columns)
        found = torch.stack([(table[gradient.ids] * gradient.columns).sum(2) for table in tables], 1)
    else:
        return None
    return found if found.shape[2] == length else None
