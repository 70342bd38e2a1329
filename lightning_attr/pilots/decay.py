"""The learning rate of a pilot: the user's own, and zero in the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_attr.parameters.learning_rates import LearningRates


class DecayToZero(L.Callback):
    r"""Ends every schedule at zero: in the last half of a run no learning rate is above a line that falls to zero.

    .. math::
        \eta_t = \min\left(\eta^{user}_t,\; 2 (1 - t/T) \max_{s \le t} \eta^{user}_s\right)

    A schedule that the user made for the length of this run, linear, cosine or one cycle, lies below that line and
    stays as it is. One made for a longer run, or none at all, is brought to an end. What the optimizer's groups hold
    between steps is the user's own, so that schedulers that go on from it see nothing.

    Args:
        batches: counts those of the whole run, :math:`T`, once its Trainer has its loader.

    Attributes:
        rates: what the optimizers used, summed over steps.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> decay, used = DecayToZero(lambda trainer: 4), []
        >>> for batch in range(4):
        ...     decay.left = 1 - batch / 4
        ...     decay.lower(optimizer)
        ...     used.append(optimizer.param_groups[0]["lr"])
        ...     decay.restore(optimizer)
        >>> used, optimizer.param_groups[0]["lr"]
        ([0.1, 0.1, 0.1, 0.05], 0.1)
    """

    def __init__(self, batches: Callable[[L.Trainer], int]) -> None:
        self.batches = batches
        self.done = 0
        self.left = 1.0  # of the run
        self.rates = LearningRates()
        self._peaks: dict[tuple[int, int], float] = {}
        self._own: dict[int, list[Any]] = {}
        self._remove: list[Callable[[], None]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Come in before and after each step of the optimizers."""
        for optimizer in trainer.optimizers:
            step = optimizer.register_step_pre_hook(lambda own, *_: self.lower(own))
            after = optimizer.register_step_post_hook(lambda own, *_: self.restore(own))
            self._remove += [step.remove, after.remove]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Integrate the learning rates, as the callback that records a run does."""
        within = id(optimizer) in self._own  # a closure runs inside the step, mixed precision calls this before it
        self.lower(optimizer)
        self.rates.add(optimizer, pl_module, trainer.global_step)
        if not within:
            self.restore(optimizer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Come nearer to the end."""
        self.done += 1
        self.left = max(0.0, 1 - self.done / self.batches(trainer))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Let go of the optimizers."""
        for remove in self._remove:
            remove()

    def lower(self, optimizer: Optimizer) -> None:
        """Put learning rates below the line, for one step."""
        if id(optimizer) in self._own:
            return
        self._own[id(optimizer)] = [group.get("lr") for group in optimizer.param_groups]
        for place, group in enumerate(optimizer.param_groups):
            rate = group.get("lr")
            if rate is None:
                continue
            key = (id(optimizer), place)
            self._peaks[key] = max(self._peaks.get(key, 0.0), float(rate))
            line = 2 * self.left * self._peaks[key]
            if float(rate) > line:
                group["lr"] = torch.full_like(rate, line) if isinstance(rate, Tensor) else line

    def restore(self, optimizer: Optimizer) -> None:
        """Put the user's learning rates back."""
        for group, rate in zip(optimizer.param_groups, self._own.pop(id(optimizer), []), strict=False):
            if rate is not None:
                group["lr"] = rate
