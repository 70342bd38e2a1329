"""The curvature of the loss of one batch, and the batches that a sum over training samples goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_attr.batches.nested import float_tensors, join_batches, map_tensors, select_rows
from lightning_attr.curvature.parameter_vectors import Product
from lightning_attr.curvature.products import ggn_product, hessian_product
from lightning_attr.errors import AttributionError
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.gradients.functional import call_with
from lightning_attr.objectives.apart import OutputApart
from lightning_attr.objectives.mixin import attribution_outputs
from lightning_attr.objectives.objective import MixinOutput

Curvature: TypeAlias = Literal["ggn", "hessian", "empirical_fisher"]


def check_outputs(model: SnapshotModel) -> None:
    """Check that a module shows its outputs, and how the loss depends on them."""
    if not isinstance(model.plan.objective, MixinOutput):
        name = type(model.module).__name__
        raise TypeError(
            f"Expected {name} to have lightning_attr.AttributionMixin among its bases for `curvature='ggn'`, which "
            "needs its outputs, but it shows the loss of its training step only. Add the mixin, or use "
            "`curvature='empirical_fisher'` or 'hessian'."
        )


def _check_derivatives(model: SnapshotModel) -> None:
    pairs = [name for name, p in model.parameters().items() if p.is_complex()]
    if pairs:
        raise AttributionError(
            f"Expected real parameters for a curvature of the loss, but `{pairs[0]}` of {type(model.module).__name__} "
            "is a complex parameter. Take a method on gradients, which treats it as pairs of real numbers (TRAK, "
            "TracIn, GradDot, GradCos, LESS, GAS, ProjectedInfluence, LoGra, FactGraSS), or freeze it."
        )
    if isinstance(model.plan.objective, OutputApart):
        raise AttributionError(
            f"{model.said_apart} Take one without a curvature of the module: TRAK, TracIn, GradDot, GradCos, LESS, "
            "GAS, ProjectedInfluence, LoGra, FactGraSS."
        )
    if model.plan.inner:
        raise AttributionError(
            f"{type(model.module).__name__} differentiates inside its step, and products with the curvature of its "
            "loss cannot be taken through that. Take a method without a curvature of the module: TRAK, TracIn, "
            "GradDot, GradCos, LESS, GAS, ProjectedInfluence, LoGra, FactGraSS."
        )


class BatchCurvature:
    """Prepares products with the sum of the curvatures of a batch, at the weights that a module has now.

    Args:
        model: the module at a snapshot, with its weights loaded.
        curvature: which.

    Raises:
        TypeError: if the GGN is wanted of a module that does not show its outputs.
        AttributionError: if its loss cannot be differentiated twice.
    """

    def __init__(self, model: SnapshotModel, curvature: str) -> None:
        _check_derivatives(model)
        if curvature == "ggn":
            check_outputs(model)
        self.model = model
        self.curvature = curvature
        # Copies: the next snapshot's weights go into the same module, and graphs that are kept want these.
        self.point = {name: p.to(model.dtype, copy=True) for name, p in model.parameters().items()}
        tensors = {**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}
        self._beside = {
            name: tensor.detach().to(model.dtype, copy=True)
            for name, tensor in tensors.items()
            if name not in self.point and tensor.dtype.is_floating_point
        }

    def product(self, batch: Any, size: int) -> Product:
        """Prepare the product with the sum of the curvatures of a batch."""
        objective = self.model.plan.objective
        batch = map_tensors(batch, lambda tensor: tensor.to(self.model.dtype) if tensor.is_floating_point() else tensor)

        def losses(params: Mapping[str, Tensor]) -> Tensor:
            return objective.losses({**self._beside, **params}, batch, size)

        if self.curvature == "hessian":
            return hessian_product(
                lambda params: objective.total_loss({**self._beside, **params}, batch, size), self.point
            )
        if self.curvature == "empirical_fisher":  # the GGN of half the squares of the losses
            return ggn_product(losses, lambda values: values.square().sum() / 2, self.point)
        outputs, loss = self._outputs(batch)
        return ggn_product(outputs, loss, self.point)

    def _outputs(self, batch: Any) -> tuple[Callable[[Any], Tensor], Callable[[Tensor], Tensor]]:
        """Split the loss into the module's outputs, as one tensor, and what follows them."""
        module: Any = self.model.module

        def step(params: Mapping[str, Tensor]) -> tuple[Any, Any]:
            step = partial(attribution_outputs, module)
            called: tuple[Any, Any] = call_with(module, {**self._beside, **params}, step, batch)
            return called

        with torch.no_grad():
            structure, targets = step(self.point)
        sizes = [tensor.numel() for tensor in float_tensors(structure)]

        def outputs(params: Mapping[str, Tensor]) -> Tensor:
            return torch.cat([tensor.flatten() for tensor in float_tensors(step(params)[0])])

        def loss(values: Tensor) -> Tensor:
            parts = iter(values.split(sizes))
            placed = map_tensors(structure, lambda t: next(parts).view(t.shape) if t.is_floating_point() else t)
            total: Tensor = module.model_output.loss(placed, targets).sum()
            return total

        return outputs, loss


def batches_of(model: SnapshotModel, wanted: set[int] | None) -> Iterator[tuple[list[int], Any]]:
    """Go through this process's samples, or those wanted, of which as many go together as a batch has."""
    parts: list[tuple[list[int], Any]] = []
    largest, waiting = 0, 0
    for rows, batch in model.train_batches():
        chosen = [i for i, row in enumerate(rows) if wanted is None or row in wanted]
        if waiting and waiting + len(chosen) > largest:
            yield from joined_batches(parts)
            parts, waiting = [], 0
        largest = max(largest, len(rows))
        if chosen:
            part = batch if len(chosen) == len(rows) else select_rows(batch, len(rows), chosen)
            parts.append(([rows[i] for i in chosen], part))
            waiting += len(chosen)
    yield from joined_batches(parts)


def joined_batches(parts: Sequence[tuple[list[int], Any]]) -> Sequence[tuple[list[int], Any]]:
    """Make one batch of several, if they differ in nothing but their samples."""
    if len(parts) < 2:
        return parts
    try:
        batch = join_batches([batch for _, batch in parts], [len(rows) for rows, _ in parts])
    except ValueError:
        return parts
    return [([row for rows, _ in parts for row in rows], batch)]
