"""What a user's function measures of each target, in place of the model output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_attr.errors import NonFiniteGradientError
from lightning_attr.gradients.functional import call_with
from lightning_attr.user_code.calls import called

TargetFunction: TypeAlias = Callable[[Any, Any], Tensor]
"""``(module, batch) -> (b,)``: what is measured of each target, higher is more of it."""


@dataclass(frozen=True)
class MeasuredOutput:
    """What a function measures of each target, in place of the model output.

    Args:
        module: that it measures.
        function: ``(module, batch) -> (b,)``, differentiable, each sample on its own.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> size = MeasuredOutput(layer, lambda module, batch: module(batch).square().sum(1))
        >>> sorted(size.columns(torch.ones(3, 2), *size.forward(torch.ones(3, 2), 3)))
        ['loss', 'newton_weight', 'out_to_loss', 'output']
    """

    module: Any = field(repr=False, compare=False)
    function: TargetFunction

    def forward(self, batch: Any, batch_size: int) -> tuple[Tensor, Any]:
        """Value of each target, ``(b,)``, and nothing."""
        values = self._called(batch)
        if not isinstance(values, Tensor) or values.shape != (batch_size,):
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"Expected argument `target_function` to return one value a target, of shape ({batch_size},), but got "
                f"{found}. Reduce over everything but the batch."
            )
        if not values.dtype.is_floating_point:
            raise ValueError(
                f"Expected argument `target_function` to return a floating-point tensor, but got {values.dtype}: what "
                "is counted or compared has no gradient. Measure a logit, a log-probability, a distance."
            )
        if torch.is_grad_enabled() and not values.requires_grad:
            raise ValueError(
                f"Expected argument `target_function` to be differentiable in what {type(self.module).__name__} "
                "trains, but its result has no gradient: all scores would be zero. Look for `detach()`, `item()`, "
                "`no_grad()`."
            )
        if not values.isfinite().all():
            bad = (~values.isfinite()).nonzero().flatten().tolist()
            raise NonFiniteGradientError(
                f"`target_function` returned NaN or Inf for targets {bad} of a batch of {batch_size}. Look for "
                "logarithms of zero, divisions by zero and means over nothing.",
                bad,
                batch_size,
            )
        return values, None

    def columns(self, batch: Any, output: Tensor, seen: Any) -> dict[str, Tensor]:
        """Value of each target; as a loss, it is its negative."""
        ones = torch.ones_like(output)
        return {"output": output, "loss": -output, "out_to_loss": ones, "newton_weight": ones}

    def sample_outputs(self, batch: Any, batch_size: int) -> Tensor:
        """Value of each target, ``(b,)``."""
        return self.forward(batch, batch_size)[0]

    def functional_output(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Value at given parameters."""
        value: Tensor = call_with(self.module, params, lambda batch: self._called(batch), batch)
        return value

    def total_loss(self, params: Mapping[str, Tensor], batch: Any, batch_size: int) -> Tensor:
        """Negative sum of the values at given parameters, ``()``."""
        return self.losses(params, batch, batch_size).sum()

    def losses(self, params: Mapping[str, Tensor], batch: Any, batch_size: int) -> Tensor:
        """Negative values at given parameters, ``(b,)``."""
        return -self.functional_output(params, batch)

    def _called(self, batch: Any) -> Any:
        return called(self.module, "target_function", partial(self.function, self.module), batch)
