"""Steps of SGD, Adam and AdamW as functions of parameters, moments and gradients that can be differentiated.

Operations and their order are those of torch's own loop over tensors, so that values are the same to the last bit where
torch uses it (on CPUs, unless ``foreach`` or ``fused`` is asked for).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_attr.replay.state import RunState

KINDS = ("SGD", "Adam", "AdamW")
"""Optimizers of ``torch.optim`` that have a form."""


@dataclass(frozen=True)
class GroupForm:
    r"""How an optimizer updates the parameters of one group.

    .. math::
        \text{SGD:}\quad b \leftarrow \mu b + (1 - d)\, g, \qquad \theta \leftarrow \theta - \eta\, b

    .. math::
        \text{Adam:}\quad m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2,
        \quad \theta \leftarrow \theta - \eta \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    With weight decay :math:`\rho`, :math:`g` is :math:`\nabla L + \rho\theta`; AdamW multiplies :math:`\theta` by
    :math:`1 - \eta\rho` in its place. Where :math:`v` is zero, so has the gradient been in all steps: the derivative by
    :math:`v`, which would be infinite times zero, is taken as zero there.

    Args:
        kind: class of the optimizer, one of :data:`KINDS`.
        names: of the parameters.
        lr: learning rate of the step.
        weight_decay: of the step.
        settings: the others: ``momentum``, ``dampening``, ``nesterov``; ``betas``, ``eps``; ``maximize``.

    Example:
        >>> form = GroupForm("SGD", ("w",), lr=0.5)
        >>> form.updated(RunState.begin({"w": torch.ones(1)}, {}), {"w": torch.ones(1)}).parameters
        {'w': tensor([0.5000])}
    """

    kind: str
    names: tuple[str, ...]
    lr: float
    weight_decay: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def updated(self, state: RunState, gradients: Mapping[str, Tensor]) -> RunState:
        """Update the parameters of the group that have a gradient."""
        parameters, first, second = dict(state.parameters), dict(state.first), dict(state.second)
        updates = dict(state.updates)
        update = self._sgd if self.kind == "SGD" else self._adam
        for name in self.names:
            if name in gradients:
                gradient = -gradients[name] if self.settings.get("maximize") else gradients[name]
                found = update(state, name, gradient)
                for part, tensor in zip((parameters, first, second), found, strict=True):
                    if tensor is not None:
                        part[name] = tensor
                updates[name] = state.updates.get(name, 0) + 1
        return RunState(parameters, state.buffers, first, second, updates)

    def _sgd(self, state: RunState, name: str, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        momentum, dampening = self.settings.get("momentum", 0.0), self.settings.get("dampening", 0.0)
        parameter, buffer = state.parameters[name], state.first.get(name)
        if self.weight_decay != 0:
            gradient = gradient.add(parameter, alpha=self.weight_decay)
        if momentum != 0:
            buffer = gradient if buffer is None else buffer.mul(momentum).add(gradient, alpha=1 - dampening)
            gradient = gradient.add(buffer, alpha=momentum) if self.settings.get("nesterov") else buffer
        return parameter.add(gradient, alpha=-self.lr), buffer, None

    def _adam(self, state: RunState, name: str, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (beta1, beta2), eps = self.settings["betas"], self.settings["eps"]
        parameter, step = state.parameters[name], state.updates.get(name, 0) + 1
        zeros = torch.zeros_like(parameter)
        m, v = state.first.get(name, zeros), state.second.get(name, zeros)
        if self.weight_decay != 0 and self.kind == "AdamW":
            parameter = parameter.mul(1 - self.lr * self.weight_decay)
        elif self.weight_decay != 0:
            gradient = gradient.add(parameter, alpha=self.weight_decay)
        m = m.lerp(gradient, 1 - beta1)
        v = v.mul(beta2).addcmul(gradient, gradient, value=1 - beta2)
        size = self.lr / (1 - beta1**step)
        divisor = (_root(v) / (1 - beta2**step) ** 0.5).add(eps)
        return parameter.addcdiv(m, divisor, value=-size), m, v


def _root(v: Tensor) -> Tensor:
    """The square root, with the derivative zero at zero."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, torch.ones_like(v)).sqrt(), v.detach())


@dataclass(frozen=True)
class Clipping:
    """How gradients are clipped before a step.

    Args:
        value: the largest norm, or the largest absolute value of an entry.
        algorithm: "norm", of all gradients together, or "value".

    Example:
        >>> Clipping(1.0, "value")({"w": torch.tensor([3.0, 0.5])})
        {'w': tensor([1.0000, 0.5000])}
    """

    value: float
    algorithm: str

    def __call__(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Clip, as ``torch.nn.utils.clip_grad_norm_`` and ``clip_grad_value_`` do."""
        if self.algorithm == "value":
            return {name: g.clamp(min=-self.value, max=self.value) for name, g in gradients.items()}
        if not gradients:
            return {}
        norms = torch._foreach_norm(list(gradients.values()), 2.0)
        total = torch.linalg.vector_norm(torch.stack(norms), 2.0)
        factor = torch.clamp(self.value / (total + 1e-6), max=1.0)
        return {name: g * factor for name, g in gradients.items()}


def updated(
    state: RunState, gradients: Mapping[str, Tensor], groups: Sequence[GroupForm], clipping: Clipping | None = None
) -> RunState:
    """Clip the gradients, and update the parameters of all groups.

    Returns the state after the step; parameters without a gradient stay as they are.

    Example:
        >>> forms = [GroupForm("SGD", ("v",), lr=0.1), GroupForm("SGD", ("w",), lr=1.0)]
        >>> state = RunState.begin({"v": torch.ones(1), "w": torch.ones(1)}, {})
        >>> updated(state, {"v": torch.ones(1), "w": torch.ones(1)}, forms, Clipping(0.5, "value")).parameters
        {'v': tensor([0.9500]), 'w': tensor([0.5000])}
    """
    if clipping is not None:
        gradients = clipping({name: gradients[name] for form in groups for name in form.names if name in gradients})
    for form in groups:
        state = form.updated(state, gradients)
    return state
