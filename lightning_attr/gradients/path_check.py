"""Which path gives each parameter's per-sample gradients, decided by comparing with autograd on a few samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_attr.batches.nested import select_rows
from lightning_attr.errors import AttributionError, BatchDependenceError, NonFiniteGradientError
from lightning_attr.gradients.factored import ParameterGradient, materialise, single_product
from lightning_attr.gradients.full_precision import full_precision
from lightning_attr.gradients.functional import FunctionalOutput, densely, loop_gradients, vmap_gradients
from lightning_attr.gradients.hooks import HookedGradients, hooked_layers
from lightning_attr.gradients.inner_autograd import watch_autograd
from lightning_attr.gradients.plain_execution import plain_execution
from lightning_attr.parameters.layout import as_pairs, real_dtype

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GradientPlan:
    """The path of each trainable parameter.

    Args:
        hooked: names whose every use is seen in the pass of the hooks, by a layer's rule or a function that is known;
            also those that have no part in the output, as long as a later use could not go unseen.
        fallback: the other names.
        vectorised: whether the fallback is ``vmap(grad)``; a loop over samples otherwise.
        direct: names among ``hooked`` that layers with a rule own and other code uses as well, or may come to use.
        outer: names among ``hooked`` of which a sample's gradient is one outer product, as that of a linear layer is
            that sees a sample once, at one position; with the biases of these layers.
        inner: whether the module differentiates inside its forward pass, and so needs gradients enabled.

    Example:
        >>> GradientPlan(hooked=("weight",), fallback=(), vectorised=True).hooked
        ('weight',)
    """

    hooked: tuple[str, ...]
    fallback: tuple[str, ...]
    vectorised: bool
    direct: tuple[str, ...] = field(default=(), kw_only=True)
    outer: tuple[str, ...] = field(default=(), kw_only=True)
    inner: bool = field(default=False, kw_only=True)


@full_precision()
def plan_gradients(
    module: nn.Module,
    forward: Callable[[Any], Tensor],
    functional_output: FunctionalOutput,
    batch: Any,
    batch_size: int,
    sample_outputs: Callable[[Any], Tensor] | None = None,
) -> GradientPlan:
    """Choose the path of each trainable parameter; every choice is checked against autograd, sample by sample.

    Args:
        module: the module, in eval mode.
        forward: runs it on a batch and returns the model output of each sample, ``(b,)``.
        functional_output: the same at given parameters.
        batch: a few samples; two to four are enough to tell.
        batch_size: number of samples in it.
        sample_outputs: the model output of each sample with its own gradient, where only the sum of ``forward`` has
            one; ``forward`` itself by default.

    Returns:
        The plan. A log line names the parameters that go through the fallback, and their share.

    Raises:
        BatchDependenceError: if no path agrees with autograd, because samples of a batch affect each other.
        NonFiniteGradientError: if a gradient is NaN or Inf.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.func import functional_call
        >>> layer, x = nn.Linear(2, 1), torch.randn(3, 2)
        >>> plan_gradients(layer, lambda x: layer(x)[:, 0], lambda p, x: functional_call(layer, dict(p), x)[:, 0], x, 3)
        ... # doctest: +NORMALIZE_WHITESPACE
        GradientPlan(hooked=('weight', 'bias'), fallback=(), vectorised=True,
                     direct=(), outer=('weight', 'bias'), inner=False)
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def reference(names: Collection[str]) -> _Reference:
        wanted = {name: p for name, p in trainable.items() if name in names}
        return _Reference.of(sample_outputs or forward, wanted, batch, batch_size)

    first = reference(trainable)
    if not all(math.isfinite(norm) for norm in first.norms.values()):
        _raise_not_finite(first.rows, loop_gradients(functional_output, trainable, batch, batch_size))
    attempt = partial(_covered, module, forward, trainable, batch, batch_size, first, reference)
    covered, direct, outer, cause = _tried(attempt, first.inner)
    first.rows.clear()
    fallback = {name: p for name, p in trainable.items() if name not in covered}
    vectorised = True
    if fallback:
        rows = _vmap_rows(functional_output, fallback, batch, batch_size)
        vectorised = rows is not None and len(reference(fallback).agreeing(rows, first)) == len(fallback)
        if not vectorised:
            rows = loop_gradients(functional_output, fallback, batch, batch_size)
            right = reference(fallback).agreeing(rows, first, rounding=8.0)
            wrong = [name for name in fallback if name not in right]
            if wrong:
                raise BatchDependenceError(
                    f"The gradient of a sample's model output in {_some(wrong)} changes with the samples beside it in "
                    "the batch. Attribution needs outputs that are computed for each sample on its own: look for "
                    "statistics or comparisons over the batch in `attribution_step` and `model_output`."
                )
        _log_fallback(module, trainable, fallback, vectorised, cause)
    names = tuple(name for name in trainable if name in covered)
    return GradientPlan(
        names,
        tuple(fallback),
        vectorised,
        direct=tuple(name for name in names if name in direct),
        outer=tuple(name for name in names if name in outer - direct),
        inner=first.inner,
    )


def check_batch_independence(forward: Callable[[Any], Tensor], batch: Any, batch_size: int) -> None:
    """Check that each sample's model output is its own: compare a batch with its two halves.

    Args:
        forward: returns the model output of each sample of a batch, ``(b,)``.
        batch: a few samples.
        batch_size: number of samples in it; with one there is nothing to compare.

    Raises:
        BatchDependenceError: if the halves give other outputs than the whole.
        NonFiniteGradientError: if an output is NaN or Inf.
        ValueError: if the output has not one value per sample.

    Example:
        >>> import torch
        >>> check_batch_independence(lambda x: x.square(), torch.ones(4), 4)
        >>> check_batch_independence(lambda x: x - x.mean(), torch.arange(4.0), 4)
        Traceback (most recent call last):
        ...
        lightning_attr.errors.BatchDependenceError: ...
    """
    half = batch_size // 2
    with torch.enable_grad():  # some steps differentiate
        whole = forward(batch).detach()
        if whole.shape != (batch_size,):
            raise ValueError(
                f"Expected `model_output.output` to return one value a sample, of shape ({batch_size},), but got "
                f"{tuple(whole.shape)}."
            )
        if not whole.isfinite().all():
            rows = (~whole.isfinite()).nonzero().flatten().tolist()
            raise NonFiniteGradientError(
                f"The model output is NaN or Inf (positions {rows} of the {batch_size} samples that were tried). Check "
                "the inputs and the weights.",
                rows,
                batch_size,
            )
        if half == 0:
            return
        parts = (list(range(half)), list(range(half, batch_size)))
        halves = [forward(select_rows(batch, batch_size, part)).detach() for part in parts]
    for part, outputs in zip(parts, halves, strict=True):
        if outputs.shape != (len(part),):
            raise ValueError(
                f"Expected a part of {len(part)} of the {batch_size} samples to give outputs of shape ({len(part)},), "
                f"but got {tuple(outputs.shape)}. A batch is split along the first dimension of its tensors: let "
                "the collate function give tensors of shape (b, ...), padded where samples differ in size, rather than "
                "lists of one tensor a sample."
            )
    split = torch.cat(halves)
    tolerance = _tolerance(whole.dtype) * (1 + whole.abs().max())
    worst = (whole - split).abs().max()
    if worst > tolerance:
        raise BatchDependenceError(
            f"The model output of a sample depends on the samples beside it: the same {batch_size} samples in one "
            f"batch and in two differ by up to {worst:.3g}. Attribution needs outputs that are computed for each "
            "sample on its own: look for random numbers (dropout outside eval mode), contrastive losses, or means over "
            "the batch in `attribution_step` and `model_output`."
        )


@dataclass
class _Reference:
    """Each sample's gradients by autograd; what is compared with them is taken away, so that all is kept but once."""

    rows: dict[str, Tensor]
    norms: dict[str, float]
    eps: float  # what rounding does to a number
    unused: set[str]  # names that have no part in the output
    inner: bool  # whether the module differentiates in its forward pass

    @classmethod
    def of(
        cls, forward: Callable[[Any], Tensor], trainable: Mapping[str, Tensor], batch: Any, batch_size: int
    ) -> _Reference:
        rows = {name: p.new_zeros(batch_size, *p.shape) for name, p in trainable.items()}
        unused = set(trainable)
        with torch.enable_grad(), plain_execution():
            with watch_autograd() as inner:
                output = forward(batch)
            for i in range(batch_size):
                found = torch.autograd.grad(output[i], list(trainable.values()), retain_graph=True, allow_unused=True)
                for name, row in zip(trainable, found, strict=True):
                    if row is not None:
                        unused.discard(name)
                        rows[name][i] = densely(row)
                del found, row  # before the next are made
        eps = max(torch.finfo(p.dtype).eps for p in trainable.values())
        return cls(rows, {name: as_pairs(row).norm().item() for name, row in rows.items()}, eps, unused, inner.seen)

    @property
    def total(self) -> float:
        """Norm of all gradients."""
        return math.sqrt(sum(norm**2 for norm in self.norms.values()))

    def take(self, name: str, gradient: Tensor) -> None:
        """Take what was found for a parameter away."""
        self.rows[name].sub_(gradient)

    def left(self, name: str, noise: float) -> bool:
        """Whether more is left of a parameter than rounding leaves."""
        limit = _tolerance(self.rows[name].dtype) * self.norms[name] + noise + 1e-12
        return not self.rows[name].norm().item() <= limit

    def agreeing(self, rows: Mapping[str, Tensor], whole: _Reference, rounding: float | None = None) -> set[str]:
        """The names whose gradients are right, where those of all parameters together tell what is noise."""
        noise = _noise(whole) if rounding is None else rounding * whole.eps * whole.total
        for name, found in rows.items():
            self.take(name, found)
        return {name for name in rows if not self.left(name, noise)}


def _raise_not_finite(reference: Mapping[str, Tensor], loop: Mapping[str, Tensor]) -> None:
    """Name parameters and samples; only the loop tells which, as zero times infinity is NaN for the neighbours, too."""
    names = [name for name, rows in reference.items() if not rows.isfinite().all()]
    finite = torch.stack([rows.isfinite().reshape(len(rows), -1).all(1) for rows in loop.values()]).all(0)
    positions = (~finite).nonzero().flatten().tolist()
    raise NonFiniteGradientError(
        f"The gradient of the model output in {_some(names)} is NaN or Inf (positions {positions} of the {len(finite)} "
        "samples that were tried). Look for an infinite slope in the model output or the loss, such as that of a root "
        "or a norm at zero.",
        positions,
        len(finite),
    )


def _tried(
    attempt: Callable[[], tuple[set[str], set[str], set[str]]], inner: bool
) -> tuple[set[str], set[str], set[str], str | None]:
    """Try the pass of the hooks; where it cannot be, nothing is covered, and the last result is the cause."""
    if inner:  # hooks cut the graph that it differentiates, and see its gradients as if they were ours
        return set(), set(), set(), "the module differentiates inside its forward pass, which hooks would disturb"
    try:
        return (*attempt(), None)
    except AttributionError:
        raise
    except Exception as error:
        return set(), set(), set(), f"with hooks, the module raises {type(error).__name__}: {error}"


def _covered(
    module: nn.Module,
    forward: Callable[[Any], Tensor],
    trainable: Mapping[str, Tensor],
    batch: Any,
    batch_size: int,
    first: _Reference,
    reference: Callable[[Collection[str]], _Reference],
) -> tuple[set[str], set[str], set[str]]:
    """The names that hooks get right, those among them to be followed outside their layers, and outer products.

    A name without gradients is right only if it has no part in the output, not if its gradient happens to be zero.

    Returns the sets of names.
    """
    noise, unused = _noise(first), set(first.unused)
    outer: set[str] = set()

    def right(hooked: HookedGradients, against: _Reference) -> set[str]:
        seen: set[str] = set()
        skipped: set[str] = set()
        outer.clear()

        def add(gradients: Mapping[str, ParameterGradient]) -> None:
            for name, gradient in gradients.items():
                if name in seen:
                    outer.discard(name)
                elif single_product(gradient) is not None:
                    outer.add(name)
                seen.add(name)
                against.take(name, materialise(gradient, tuple(trainable[name].shape)))

        hooked(lambda: forward(batch), batch_size, add, skipped)
        agree = {name for name in seen if not against.left(name, noise)}
        return (agree | (unused - seen)) - skipped

    # Rules are for real parameters: their products of complex ones lack the conjugation.
    real = [name for name, p in trainable.items() if not p.is_complex()]
    unused = unused.intersection(real)
    hooked = HookedGradients(module, real)
    covered = right(hooked, first)
    ruled = {name for own in hooked_layers(module).values() for name in own.values()}
    direct = (hooked.used | unused) & covered & ruled
    first.rows.clear()
    if hooked.used & covered:  # once more, as it will be done
        covered &= right(HookedGradients(module, covered, direct), reference(trainable))
    return covered, direct & covered, outer


def _vmap_rows(
    functional_output: FunctionalOutput, params: Mapping[str, Tensor], batch: Any, batch_size: int
) -> dict[str, Tensor] | None:
    try:
        return vmap_gradients(functional_output, params, batch, batch_size)
    except Exception as error:
        log.info("vmap(grad) does not work for this module, falling back to a loop over samples: %s", error)
        return None


def _noise(reference: _Reference) -> float:
    """What rounding leaves of gradients that are zero in exact arithmetic, such as those of the bias of keys."""
    return min(8 * reference.eps, 1e-5) * reference.total


def _tolerance(dtype: torch.dtype) -> float:
    return max(1e-3 if real_dtype(dtype) == torch.float32 else 1e-8, 8 * torch.finfo(dtype).eps)


def _log_fallback(
    module: nn.Module,
    trainable: Mapping[str, Tensor],
    fallback: Mapping[str, Tensor],
    vectorised: bool,
    cause: str | None,
) -> None:
    """Say which parameters are slower, and why."""
    share = sum(p.numel() for p in fallback.values()) / sum(p.numel() for p in trainable.values())
    ruled = {name for own in hooked_layers(module).values() for name in own.values()}
    groups: dict[str, list[str]] = {}
    for name, p in fallback.items():
        if p.is_complex():
            why = "are complex, and rules are for real parameters"
        elif name in ruled:
            why = "are used in ways that the rule of their layer does not see"
        else:
            why = "belong to no layer with a gradient rule"
        groups.setdefault(why, []).append(name)
    causes = [f"{_some(names)} {why}" for why, names in groups.items()] if cause is None else [cause]
    log.warning(
        "%s: %s (%.1f%% of the trainable parameters) go through %s, which is slower: %s.",
        type(module).__name__,
        _some(list(fallback)),
        100 * share,
        "vmap(grad)" if vectorised else "a loop over samples",
        "; ".join(causes),
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more parameters"
