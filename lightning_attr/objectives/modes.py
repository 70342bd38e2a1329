"""In which mode a module is attributed: eval, or train with the statistics of its batches frozen."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

MODES = ("eval", "train")


def check_mode(mode: Any) -> None:
    """Check the name of a mode."""
    if not (mode is None or (isinstance(mode, str) and mode in MODES)):
        raise ValueError(f"Expected argument `mode` to be 'eval', 'train' or None, but got {mode!r}.")


def set_mode(module: nn.Module, mode: str, *, dropout: bool = True) -> None:
    """Put a module into a mode for attribution."""
    module.train(mode == "train")
    for layer in module.modules():
        if _keeps_statistics(layer) or (not dropout and _drops(layer)):
            layer.training = False


def _keeps_statistics(layer: nn.Module) -> bool:
    kind = isinstance(layer, _NormBase) or _scripted(layer).endswith(("BatchNorm", "InstanceNorm"))
    return kind and getattr(layer, "running_mean", None) is not None


def _drops(layer: nn.Module) -> bool:
    return isinstance(layer, (_DropoutNd, nn.RReLU)) or _scripted(layer).endswith(("Dropout", "RReLU"))


def _scripted(layer: nn.Module) -> str:
    """Give the class that a layer had before TorchScript compiled it, without its dimensions; nothing for others."""
    name = getattr(layer, "original_name", "") if isinstance(layer, torch.jit.ScriptModule) else ""
    return str(name).rstrip("123d")


@contextmanager
def in_mode(module: nn.Module, mode: str, *, dropout: bool = True) -> Iterator[None]:
    """Put a module into a mode for a while; see :func:`set_mode`."""
    before = [(layer, layer.training) for layer in module.modules()]
    try:
        set_mode(module, mode, dropout=dropout)
        yield
    finally:
        for layer, training in before:
            layer.training = training


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Start the random streams of python, numpy and torch at a seed; whoever calls puts them back."""
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - the legacy stream is what modules draw from
        torch.manual_seed(seed % 2**63)
    yield


class MeanNoise(TorchDispatchMode):
    """Puts their means in the places of random numbers: dropout and noise change nothing, and all else is as it is."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @override
    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation; :data:`_MEANS` has those that draw."""
        given = kwargs or {}
        mean = _MEANS.get(function)
        return function(*args, **given) if mean is None else mean(*args, **given)


def _unchanged(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return x.clone(), torch.ones_like(x, dtype=torch.bool)


def _empty_like(x: Tensor, value: float, kwargs: dict[str, Any]) -> Tensor:
    return torch.full_like(x, value, **{name: v for name, v in kwargs.items() if name != "generator"})


def _full(value: float) -> Callable[..., Tensor]:
    def full(size: Any, *args: Any, **kwargs: Any) -> Tensor:
        kwargs = {name: v for name, v in kwargs.items() if name != "generator"}
        return torch.full(size, value, **{"dtype": torch.get_default_dtype(), **kwargs})

    return full


def _identity(n: int, *, generator: Any = None, **kwargs: Any) -> Tensor:
    return torch.arange(n, **kwargs)


_aten = torch.ops.aten
_MEANS: dict[Any, Callable[..., Any]] = {
    _aten.native_dropout.default: _unchanged,
    _aten.native_dropout_backward.default: lambda gradient, mask, scale: gradient.clone(),
    _aten.bernoulli.default: lambda p, **kwargs: p.clone(),
    _aten.bernoulli.p: lambda x, p=0.5, **kwargs: torch.full_like(x, p),
    _aten.bernoulli_.float: lambda x, p=0.5, **kwargs: x.fill_(p),
    _aten.bernoulli_.Tensor: lambda x, p, **kwargs: x.copy_(p),
    _aten.randn.default: _full(0.0),
    _aten.randn.generator: _full(0.0),
    _aten.randn_like.default: lambda x, **kwargs: _empty_like(x, 0.0, kwargs),
    _aten.normal_.default: lambda x, mean=0.0, std=1.0, **kwargs: x.fill_(mean),
    _aten.normal.Tensor_float: lambda mean, *args, **kwargs: mean.clone(),
    _aten.normal.Tensor_Tensor: lambda mean, std, **kwargs: (mean + 0 * std).clone(),
    _aten.normal.float_Tensor: lambda mean, std, **kwargs: torch.full_like(std, mean),
    _aten.rand.default: _full(0.5),
    _aten.rand.generator: _full(0.5),
    _aten.rand_like.default: lambda x, **kwargs: _empty_like(x, 0.5, kwargs),
    _aten.uniform_.default: lambda x, low=0.0, high=1.0, **kwargs: x.fill_((low + high) / 2),
    _aten.exponential_.default: lambda x, rate=1.0, **kwargs: x.fill_(1 / rate),
    _aten.randperm.default: _identity,
    _aten.randperm.generator: _identity,
}
