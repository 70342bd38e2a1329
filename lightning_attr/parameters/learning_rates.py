"""The learning rate of each parameter, summed over the optimizer steps since a snapshot."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from lightning_attr.parameters.layout import ParameterLayout


class LearningRates:
    """Integrates learning rates by parameter: those of several groups, optimizers and schedulers differ.

    Args:
        sums: parameter name -> what was summed up so far.
        common: what was summed up so far for all parameters alike.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> groups = [{"params": net[0].parameters(), "lr": 0.0}, {"params": net[1].parameters(), "lr": 0.5}]
        >>> rates = LearningRates()
        >>> net(torch.ones(1)).backward()
        >>> for step in range(2):
        ...     rates.add(torch.optim.SGD(groups, lr=0.1), net, step)
        >>> rates.of(ParameterLayout.of(net))
        (0.5, {'0.weight': 0.0, '0.bias': 0.0, '1.weight': 1.0, '1.bias': 1.0})
        >>> _ = net[0].requires_grad_(False)
        >>> rates.of(ParameterLayout.of(net))
        (1.0, None)
    """

    def __init__(self, sums: Mapping[str, float] | None = None, common: float = 0.0) -> None:
        self.sums = dict(sums or {})
        self.common = common
        self._names: dict[int, str] = {}
        self._step = -1

    def add(self, optimizer: Optimizer, module: nn.Module, step: int) -> None:
        """Add a step of an optimizer; frozen parameters take none, and without any gradient nothing moves."""
        if step == self._step or all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            return
        self._step = step
        groups = [(float(group.get("lr") or 0.0), group["params"]) for group in optimizer.param_groups]
        if any(id(p) not in self._names for _, own in groups for p in own):  # the first step, or new parameters
            self._names = {id(p): name for name, p in module.named_parameters()}
        for rate, own in groups:
            for p in own:
                name = self._names.get(id(p))
                if name is not None and p.requires_grad:
                    self.sums[name] = self.sums.get(name, 0.0) + rate

    def of(self, layout: ParameterLayout) -> tuple[float, dict[str, float] | None]:
        """Give what was summed up for some parameters.

        Returns the mean over their entries, and the sum of each if they differ, else None.
        """
        return layout.mean({name: self.sums.get(name, 0.0) + self.common for name in layout.shapes})

    def clear(self) -> None:
        """Begin anew, at a snapshot."""
        self.sums.clear()
        self.common = 0.0
