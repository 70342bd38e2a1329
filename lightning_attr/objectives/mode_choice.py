"""Eval against train mode: whether the loss of a few samples, or its gradient, depends on more than dropout."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_attr.batches.float64 import doubled
from lightning_attr.gradients.functional import densely
from lightning_attr.gradients.plain_execution import plain_execution
from lightning_attr.objectives.modes import MeanNoise, check_mode, in_mode, seeded
from lightning_attr.objectives.objective import describe_output, has_mixin, measured
from lightning_attr.user_code.isolation import preserved_rng, undisturbed

log = logging.getLogger(__name__)


def choose_mode(module: Any, batch: Any, asked: str | None = None) -> str:
    """Choose the mode that a module is attributed in, where the user has not.

    It is eval mode, unless what is attributed has another value or another gradient in train mode, with the statistics
    of BatchNorm frozen and the mean in the place of all that is random, or works in train mode only: a loss is
    attributed as it was trained.

    Returns "eval" or "train". A log line tells a choice of train mode, and a difference that remains.
    """
    check_mode(asked)
    if asked is not None:
        return asked
    trained, _ = _tried(module, batch, "train")
    if trained is None:
        return "eval"
    found, error = _tried(module, batch, "eval")
    name, what = type(module).__name__, describe_output(module)
    if found is None:
        log.warning(
            "%s: %s cannot be computed in eval mode (%s: %s), but in train mode: it is attributed in train mode, with "
            'the statistics of BatchNorm frozen. Pass mode="train" to say so.',
            name,
            what,
            type(error).__name__,
            error,
        )
        return "train"
    difference = trained.difference(found)
    if difference is None:
        return "eval"
    again, _ = _tried(module, batch, "train", seed=1)
    settled = again is not None and again.difference(trained) is None
    if not settled or (has_mixin(module) and trained.other_value(found)):
        log.warning(
            '%s: %s depends on `self.training` (%s%s): it is attributed in eval mode. Pass mode="train" to attribute '
            'it as it is trained, or mode="eval" if eval mode is meant.',
            name,
            what,
            difference,
            "" if settled else "; in train mode it is random",
        )
        return "eval"
    log.warning(
        "%s: %s depends on `self.training` (%s): it is attributed in train mode, as it was trained, with the "
        'statistics of BatchNorm frozen. Pass mode="train" to say so, or mode="eval" if eval mode is meant.',
        name,
        what,
        difference,
    )
    return "train"


def is_random(module: Any, batch: Any) -> bool:
    """Say whether what is attributed of a module is random in the mode that the module is in.

    Returns whether two seeds give two values.

    Example:
        >>> import lightning as L
        >>> class Noisy(L.LightningModule):
        ...     def training_step(self, batch):
        ...         return (batch + torch.randn_like(batch)).mean()
        >>> is_random(Noisy(), torch.ones(4))
        True
    """
    with preserved_rng(), torch.enable_grad(), plain_execution():
        first, second = (_seeded_value(module, batch, seed) for seed in (0, 1))
    return not torch.equal(first, second)


def _seeded_value(module: Any, batch: Any, seed: int) -> Tensor:
    with seeded(seed):
        return measured(module, batch).detach()


@dataclass
class _Measured:
    """The value of what is attributed, of a few samples, and its gradient in each parameter."""

    value: float
    rows: list[Tensor]

    tolerance: float = 1e-4

    def other_value(self, other: _Measured) -> bool:
        """Say whether the value differs by more than rounding."""
        return not abs(self.value - other.value) <= self.tolerance * (abs(self.value) + abs(other.value)) + 1e-7

    def difference(self, other: _Measured) -> str | None:
        """Say how one in eval mode differs; None for no more than rounding."""
        if self.other_value(other):
            return f"{other.value:.6g} in eval mode, {self.value:.6g} in train mode, of the first samples"
        norm, apart = _norm(self.rows), _norm([a - b for a, b in zip(self.rows, other.rows, strict=True)])
        if apart > 10 * self.tolerance * norm + 1e-12:
            return f"its gradient differs by {100 * apart / norm:.2g} % of its size, of the first samples"
        return None


def _tried(module: Any, batch: Any, mode: str, seed: int = 0) -> tuple[_Measured | None, Exception | None]:
    """Run a module in a mode, with means in the place of random numbers; what it raises is looked at by the caller."""
    try:
        with undisturbed(module), seeded(seed), in_mode(module, mode, dropout=False), MeanNoise():
            return _measure(lambda: measured(module, batch).sum(), module), None
    except Exception as error:
        return None, error


def _measure(run: Callable[[], Tensor], module: Any) -> _Measured:
    with torch.enable_grad(), plain_execution():
        output = run()
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows = [torch.zeros_like(p) for p in parameters]
    if output.requires_grad:
        found = torch.autograd.grad(output, parameters, allow_unused=True)
        rows = [own if row is None else densely(row) for own, row in zip(rows, found, strict=True)]
    eps = max(torch.finfo(p.dtype).eps for p in parameters)
    # TF32, which cuDNN uses unasked, rounds more.
    return _Measured(float(output.detach()), rows, max(1e-3 if output.is_cuda else 1e-4, 8 * eps))


def _norm(rows: Sequence[Tensor]) -> float:
    return math.sqrt(sum(doubled(row.abs()).square().sum().item() for row in rows))
