"""The running statistics of BatchNorm, with derivatives: the kernels of the layer have none for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self


def layers_with_statistics(module: nn.Module) -> dict[str, Any]:
    """Find the BatchNorm layers with running statistics.

    Returns the prefix of their buffers' names -> layer.

    Example:
        >>> list(layers_with_statistics(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))))
        ['0.']
    """
    return {
        f"{name}." if name else "": layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }


class _BesideLayers:
    """Sees what BatchNorm layers are given, inside a ``with`` block; may give them something else."""

    def __init__(self, module: nn.Module, see: Callable[[str, Any, Tensor], Tensor | None]) -> None:
        self.layers = layers_with_statistics(module)
        self.see = see

    def __enter__(self) -> Self:
        self.stack = ExitStack()
        for prefix, layer in self.layers.items():
            handle = layer.register_forward_pre_hook(lambda layer, args, own=prefix: self._seen(own, layer, args[0]))
            self.stack.callback(handle.remove)
        return self

    def __exit__(self, *failure: object) -> None:
        self.stack.close()

    def _seen(self, prefix: str, layer: Any, x: Tensor) -> Tensor | None:
        with torch._C.DisableTorchFunction():  # no calls of the module's, for modes around
            return self.see(prefix, layer, x)


class NewStatistics(_BesideLayers):
    r"""Computes what the layers make of their running statistics in train mode.

    .. math:: \mu \leftarrow (1 - a) \mu + a\, \bar x, \qquad \sigma^2 \leftarrow (1 - a) \sigma^2 + a\, s^2

    with the momentum :math:`a`, or one over the number of batches, and the unbiased variance :math:`s^2`.

    The layers write to copies of their buffers: graphs that hold these stay good when buffers are put back.

    Args:
        module: with the layers.
        buffers: name -> buffer before the step; None to compute nothing.

    Attributes:
        found: name -> buffer after it, of the layers that were called in train mode.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1, momentum=0.5))
        >>> with NewStatistics(net, dict(net.named_buffers())) as statistics:
        ...     _ = net(torch.tensor([[1.0], [3.0]], requires_grad=True))
        >>> statistics.found["0.running_mean"]
        tensor([1.], grad_fn=<AddBackward0>)
        >>> net[0].running_mean
        tensor([1.])
    """

    def __init__(self, module: nn.Module, buffers: Mapping[str, Tensor] | None) -> None:
        super().__init__(module, self._note)
        self.buffers = buffers
        self.found: dict[str, Tensor] = {}

    def _note(self, prefix: str, layer: Any, x: Tensor) -> None:
        if not layer.training:
            return
        for kind in ("running_mean", "running_var", "num_batches_tracked"):
            layer._buffers[kind] = layer._buffers[kind].clone()
        if self.buffers is None:
            return
        share = 1 / (int(layer.num_batches_tracked) + 1) if layer.momentum is None else layer.momentum
        dims = [dim for dim in range(x.ndim) if dim != 1]
        x = x.to(layer.running_mean.dtype)
        for kind, value in (("running_mean", x.mean(dims)), ("running_var", x.var(dims))):
            name = prefix + kind
            self.found[name] = (1 - share) * self.found.get(name, self.buffers[name]) + share * value


class UsedStatistics(_BesideLayers):
    r"""Lets what layers give in eval mode depend on their running statistics.

    They are given :math:`\mu_0 + (x - \mu) \sqrt{(\sigma_0^2 + \epsilon) / (\sigma^2 + \epsilon)}` in place of
    :math:`x`, with constants :math:`\mu_0, \sigma_0^2` of the same values: that changes nothing but the derivatives.

    Args:
        module: with the layers.
        buffers: name -> buffer that the output is to be differentiated by.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1, affine=False, eps=0.0)).eval()
        >>> mean = torch.zeros(1, requires_grad=True)
        >>> with UsedStatistics(net, {"0.running_mean": mean, "0.running_var": torch.ones(1)}):
        ...     torch.autograd.grad(net(torch.ones(1, 1)), mean)
        (tensor([-1.]),)
    """

    def __init__(self, module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
        super().__init__(module, self._shifted)
        self.buffers = buffers

    def _shifted(self, prefix: str, layer: Any, x: Tensor) -> Tensor | None:
        if layer.training:
            return None
        shape = [1, -1, *[1] * (x.ndim - 2)]
        mean, var = (self.buffers[prefix + kind].reshape(shape) for kind in ("running_mean", "running_var"))
        shifted: Tensor = mean.detach() + (x - mean) * ((var.detach() + layer.eps) / (var + layer.eps)).sqrt()
        return shifted
