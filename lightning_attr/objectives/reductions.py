"""The terms behind a reduced loss: which calls averaged or added them up, and what each sample put in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PLAIN: dict[Callable[..., Any], str] = {
    torch.mean: "mean",
    torch.Tensor.mean: "mean",
    torch.sum: "sum",
    torch.Tensor.sum: "sum",
}


@dataclass(frozen=True, eq=False)
class Reduction:
    """A call that reduced a tensor to a scalar.

    Args:
        function: ``torch.mean``, ``torch.sum``, or a loss function with an argument ``reduction``.
        args: what it was called with.
        kwargs: likewise.
        result: the scalar.

    Example:
        >>> x = torch.tensor([1.0, 3.0])
        >>> Reduction(torch.mean, (x,), {}, x.mean()).shares(2)
        tensor([0.5000, 1.5000])
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor

    def weight(self, batch_size: int) -> float:
        """Compute how much the mean term of each sample counts, times the number of samples.

        Returns 1 for a mean over them, ``b`` for a sum; where samples have several rows, or rows are not theirs, it
        changes with the number of rows as well.
        """
        kind, terms = self._terms()
        rows = terms.shape[0] if terms.ndim else 1
        of_one = {"mean": 1.0, "sum": float(batch_size), "batchmean": terms.numel() / max(rows, 1)}.get(kind, 0.0)
        return of_one if rows == batch_size else of_one + 1e6 * rows / batch_size

    def shares(self, batch_size: int) -> Tensor | None:
        """Compute what each sample puts in.

        Returns ``(b,)``, of which the result is the sum if the reduction is a plain one; None if it has other rows.
        """
        kind, terms = self._terms()
        if kind not in {"mean", "sum", "batchmean"} or terms.ndim == 0 or terms.shape[0] % batch_size:
            return None
        count = {"mean": terms.numel(), "sum": 1, "batchmean": terms.shape[0]}[kind]
        return terms.reshape(batch_size, -1).sum(1) / count

    def _terms(self) -> tuple[str, Tensor]:
        if self.function in _PLAIN:
            return _PLAIN[self.function], self.args[0] if self.args else self.kwargs["input"]
        call = inspect.signature(self.function).bind(*self.args, **self.kwargs)
        call.apply_defaults()
        kind, call.arguments["reduction"] = call.arguments["reduction"], "none"
        return kind, self.function(*call.args, **call.kwargs)


class Reductions(TorchFunctionMode):
    """Notes every reduction to a scalar inside a ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Reduction] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.ndim == 0 and _reduces(func):
            self.calls.append(Reduction(func, args, kwargs, result))
        return result


@cache
def _reduces(function: Callable[..., Any]) -> bool:
    if function in _PLAIN:
        return True
    # torch.* and Tensor.* have no signature, or a positional one without a name for the reduction.
    try:
        return inspect.isfunction(function) and "reduction" in inspect.signature(function).parameters
    except ValueError:  # a wrapper of one without, such as `**`
        return False


def shares(scalar: Tensor, calls: Sequence[Reduction], batch_size: int) -> Tensor | None:
    """Split a scalar, a linear combination of reductions, into what each sample puts in.

    Returns ``(b,)``, with its graph; its sum is the scalar only if the scalar is made of these reductions and nothing
    else, which is for the caller to compare. None if no reduction leads there.
    """
    return weighted_shares(scalar, calls, batch_size)[0]


def weighted_shares(
    scalar: Tensor, calls: Sequence[Reduction], batch_size: int
) -> tuple[Tensor | None, list[float | Tensor]]:
    """Split a scalar as :func:`shares` does, and tell the weights that samples have in it.

    Returns the shares, and for each reduction behind them the weight of a sample's mean term, times the number of
    samples: the same in every batch, unless the scalar is divided by something that the batch holds, such as labels.

    Example:
        >>> x = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> with Reductions() as reductions:
        ...     loss = x.mean()
        >>> weighted_shares(loss, reductions.calls, 2)[1]
        [1.0]
    """
    for call in calls:
        if call.result is scalar:
            return call.shares(batch_size), [call.weight(batch_size)]
    differentiable = [call for call in calls if call.result.requires_grad]
    if not (differentiable and scalar.requires_grad):
        return None, []
    results = [call.result for call in differentiable]
    with torch._C.DisableTorchFunction():  # no call of the module's, for modes around
        slopes = torch.autograd.grad(scalar, results, retain_graph=True, allow_unused=True)
    total: Tensor | None = None
    weights: list[float | Tensor] = []
    for call, slope in zip(differentiable, slopes, strict=True):
        if slope is not None:
            part = call.shares(batch_size)
            if part is None:
                return None, []
            total = slope * part if total is None else total + slope * part
            weights.append(slope.detach() * call.weight(batch_size))
    return total, weights
