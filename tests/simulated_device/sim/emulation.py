"""Where PyTorch treats devices from outside in another way than CUDA: evened out, to pass here as there.

- ``module.to(device)`` and ``p.data = ...`` keep parameters the objects that they are: ties, optimizers, hooks.
- Recurrent layers are written out: the fused cells that PyTorch would call exist for CUDA alone. As with cuDNN, and
  only while ``torch.backends.cudnn.enabled``, they have no backward pass in eval mode, and none of second order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import sim

Step = Callable[[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]


def _linear(x: Tensor, h: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    biases = weights[2:] if len(weights) == 4 else (None, None)
    return nn.functional.linear(x, weights[0], biases[0]), nn.functional.linear(h, weights[1], biases[1])


def _lstm(x: Tensor, state: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    h, c = state
    i, f, g, o = sum(_linear(x, h, weights)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, state: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (xr, xz, xn), (hr, hz, hn) = (part.chunk(3, -1) for part in _linear(x, state[0], weights))
    z = (xz + hz).sigmoid()
    return ((1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * state[0],)


def _elman(activation: Callable[[Tensor], Tensor]) -> Step:
    return lambda x, state, weights: (activation(sum(_linear(x, state[0], weights))),)


def _direction(step: Step, x: Tensor, state: tuple[Tensor, ...], weights: tuple[Tensor, ...], back: bool) -> Any:
    outputs = []
    for now in reversed(x.unbind(0)) if back else x.unbind(0):
        state = step(now, state, weights)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if back else outputs), state


def _layers(step: Step, per_state: int) -> Callable[..., Any]:
    """The call of ``torch.lstm`` and its kin, for sequences that are not packed."""

    def run(
        x: Tensor, hx: Any, params: list[Tensor], has_biases: bool, num_layers: int, dropout: float,
        train: bool, bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        states = list(hx) if per_state == 2 else [hx]
        each, ways = 4 if has_biases else 2, 2 if bidirectional else 1
        x = x.transpose(0, 1) if batch_first else x
        last = []
        for layer in range(num_layers):
            outputs = []
            for way in range(ways):
                n = layer * ways + way
                own = tuple(params[n * each : (n + 1) * each])
                output, state = _direction(step, x, tuple(s[n] for s in states), own, way == 1)
                outputs.append(output)
                last.append(state)
            x = torch.cat(outputs, -1)
            if dropout and train and layer + 1 < num_layers:
                x = nn.functional.dropout(x, dropout)
        x = x.transpose(0, 1) if batch_first else x
        x = _limited(x, train)
        return (x, *(torch.stack([state[i] for state in last]) for i in range(per_state)))

    return run


class _OnceInTraining(torch.autograd.Function):
    """cuDNN's rule for recurrent layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, train: bool) -> Tensor:
        ctx.train = train
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if not ctx.train:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        return grad, None


def _limited(x: Tensor, train: bool) -> Tensor:
    return _OnceInTraining.apply(x, train) if torch.backends.cudnn.enabled and torch.is_grad_enabled() else x


def _cell(step: Step, per_state: int) -> Callable[..., Any]:
    def run(x: Tensor, hx: Any, *weights: Tensor | None) -> Any:
        states = step(x, tuple(hx) if per_state == 2 else (hx,), tuple(w for w in weights if w is not None))
        return states if per_state == 2 else states[0]

    return run


_libraries = [torch.library.Library("aten", "IMPL", key) for key in ("PrivateUse1", "AutogradPrivateUse1")]
_STEPS = {
    "lstm": (_lstm, 2),
    "gru": (_gru, 1),
    "rnn_tanh": (_elman(torch.tanh), 1),
    "rnn_relu": (_elman(torch.relu), 1),
}
for _library in _libraries:
    for _name, (_step, _count) in _STEPS.items():
        _library.impl(f"{_name}.input", _layers(_step, _count))
        _library.impl(f"{_name}_cell", _cell(_step, _count))


_data = torch._C.TensorBase.data


def _set_data(tensor: Tensor, data: Tensor) -> None:
    if tensor.device.type == data.device.type:
        _data.__set__(tensor, data)
    else:
        sim.set_data(tensor, data)


@contextmanager
def like_cuda() -> Iterator[None]:
    """Let parameters stay themselves when they move."""
    before = torch._has_compatible_shallow_copy_type
    torch._has_compatible_shallow_copy_type = lambda a, b: True
    torch.Tensor.data = property(_data.__get__, _set_data)
    try:
        yield
    finally:
        torch._has_compatible_shallow_copy_type = before
        del torch.Tensor.data
