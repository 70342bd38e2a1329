"""What one layer of a module computes for each sample, read by a forward hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_attr.arguments.checks import check_instance
from lightning_attr.batches.nested import map_tensors
from lightning_attr.errors import AttributionError, NonFiniteGradientError
from lightning_attr.features.snapshot_model import Batches, SnapshotModel
from lightning_attr.gradients.plain_execution import plain_execution
from lightning_attr.objectives.mixin import attribution_outputs
from lightning_attr.objectives.objective import MixinOutput
from lightning_attr.objectives.target_function import MeasuredOutput
from lightning_attr.user_code.training_step import training_loss


@dataclass(frozen=True)
class Observation:
    """One forward pass, seen at one layer.

    Args:
        name: of the layer.
        layer: the layer.
        input: its input, ``(b, ...)``.
        output: its output, ``(b, ...)``.
        outputs: what the module's attribution step returns first; None for a module that has only a training step.
        targets: what it returns second, likewise.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> Observation("head", layer, torch.ones(4, 2), layer(torch.ones(4, 2)), None, None).name
        'head'
    """

    name: str
    layer: nn.Module
    input: Tensor
    output: Tensor
    outputs: Any
    targets: Any


def observe(model: SnapshotModel, batch: Any, batch_size: int, layer: str | None = None) -> Observation:
    """Run a batch, and look at one layer.

    Returns what went in and out, detached.
    """
    watched = _watched(model.module, layer)
    calls: list[tuple[str, Any, Any]] = []

    def record(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs, output: calls.append((name, next(iter((*args, *kwargs.values())), None), output))

    with ExitStack() as stack:
        for name, inner in watched.items():
            stack.callback(inner.register_forward_hook(record(name), with_kwargs=True).remove)
        stack.enter_context(plain_execution())
        stack.enter_context(torch.set_grad_enabled(model.plan.inner))
        outputs, targets = None, None
        if isinstance(model.plan.objective, MixinOutput):
            outputs, targets = map_tensors(attribution_outputs(model.module, batch), Tensor.detach)
        else:
            training_loss(model.module, batch)  # type: ignore[arg-type]  # a LightningModule: its plan says so
    name, given, output = _only_call(model.module, calls, layer)
    for what, value in (("input", given), ("output", output)):
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != batch_size:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"Expected the {what} of the layer {name!r} to be a tensor with one row a sample, of shape "
                f"({batch_size}, ...), but got {found}. Name another `layer`."
            )
    return Observation(name, watched[name], given.detach(), output.detach(), outputs, targets)


def observed(
    model: SnapshotModel,
    batches: Batches,
    columns: Callable[[Observation], Mapping[str, Tensor]],
    layer: str | None = None,
) -> Iterator[tuple[Sequence[int], dict[str, Tensor]]]:
    """Look at one layer for batch after batch.

    Shapes: batches (rows, batch), columns (b, ...). Yields the rows of a batch, and their columns.
    """

    def run(batch: Any, rows: Sequence[int]) -> dict[str, Tensor]:
        return dict(columns(observe(model, model.completed(rows, batch), len(rows), layer)))

    for rows, batch in batches:
        with model.precision():
            found = run(batch, rows) if model.memory is None else model.memory.run(run, batch, rows)
        for name, values in found.items():
            bad = (~values.isfinite()).flatten(1).any(1) if values.ndim > 1 else ~values.isfinite()
            if bad.any():
                numbers = [rows[i] for i in bad.nonzero().flatten().tolist()]
                raise NonFiniteGradientError(
                    f"The {name} of sample {', '.join(map(str, numbers[:8]))}{' ...' if len(numbers) > 8 else ''} hold "
                    f"NaN or Inf. Look at dataset[{numbers[0]}], and at the training: a diverged model has no "
                    "attribution."
                )
        yield rows, found


def class_labels(targets: Any, batch_size: int) -> Tensor | None:
    """Read class labels from the targets of an attribution step.

    Returns int64 ``(b,)`` of integers, booleans, or floating-point numbers that are all 0 or 1; None for anything else.
    """
    if not isinstance(targets, Tensor) or targets.shape not in {(batch_size,), (batch_size, 1)}:
        return None
    flat = targets.detach().reshape(-1)
    if flat.dtype.is_floating_point and not ((flat == 0) | (flat == 1)).all():
        return None
    return flat.long()


def refuse_target_function(model: SnapshotModel, method: str) -> None:
    """Refuse a function of the targets, for a method whose scores are about something else.

    Example:
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, nn.Linear): ...
        >>> batch = (torch.eye(2), torch.tensor([0, 1]))
        >>> refuse_target_function(SnapshotModel.of(Classifier(2, 3).eval(), [batch], [batch]), "RPS")
    """
    if model.target_plan is not None and isinstance(model.target_plan.objective, MeasuredOutput):
        raise AttributionError(
            f"{method} does not measure an output of the targets, so that a `target_function` would change nothing. "
            "Leave it out, or use a method of gradients."
        )


def _watched(module: nn.Module, layer: str | None) -> dict[str, nn.Module]:
    linear: dict[str, nn.Module] = {
        name: inner for name, inner in module.named_modules() if isinstance(inner, nn.Linear)
    }
    if layer is None:
        if not linear:
            raise ValueError(
                f"Expected {type(module).__name__} to have an nn.Linear whose input is the representation, but it has "
                f"none. Name a `layer`: {_names(module)}."
            )
        return linear
    layers = dict(module.named_modules(remove_duplicate=False))
    if layer not in layers:
        raise ValueError(
            f"Expected argument `layer` to name a layer of {type(module).__name__}, but got {layer!r}. Its linear "
            f"layers: {', '.join(map(repr, linear)) or 'none'}; all: {_names(module)}."
        )
    return {layer: layers[layer]}


def check_layer_name(owner: object, layer: Any) -> str | None:
    """Check the argument that names a layer; whether the module has it shows later.

    Returns the name, or None.

    Example:
        >>> check_layer_name("RPS", "head")
        'head'
    """
    if layer is not None:
        remedy = "`[name for name, _ in model.named_modules()]` lists them."
        check_instance(owner, "layer", layer, str, "the name of a layer, or None", remedy)
    return layer  # type: ignore[no-any-return]


def _only_call(module: nn.Module, calls: Sequence[tuple[str, Any, Any]], layer: str | None) -> tuple[str, Any, Any]:
    what = f"the layer {layer!r}" if layer is not None else "an nn.Linear"
    if not calls:
        raise ValueError(
            f"Expected the forward pass of {type(module).__name__} to call {what}, but it never does. Name another "
            f"`layer`: {_names(module)}."
        )
    name = calls[-1][0]
    count = sum(called == name for called, _, _ in calls)
    if count > 1:
        raise ValueError(
            f"Expected the forward pass of {type(module).__name__} to call the layer {name!r} once, but it calls it "
            f"{count} times: a sample has several values there. Name another `layer`: {_names(module)}."
        )
    return calls[-1]


def _names(module: nn.Module) -> str:
    names = [repr(name) for name, _ in module.named_modules() if name]
    return ", ".join(names[:30]) + (" ..." if len(names) > 30 else "")
