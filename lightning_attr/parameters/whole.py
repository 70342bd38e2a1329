"""Parameters that torch's ``fully_shard`` has divided among processes, made whole for as long as they are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_attr.errors import AttributionError

_FSDP = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")  # today, and before torch 2.6


def divided_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Name the parameters of which this process has a share.

    Returns name -> the share, as the module holds it; nothing for a module that is not divided.

    Example:
        >>> divided_parameters(nn.Linear(1, 1))
        {}
    """
    return {name: p for name, p in module.named_parameters() if _is_share(p)}


def check_division(module: nn.Module) -> None:
    """Refuse a module that is divided in another way than by ``fully_shard`` over the samples.

    Raises:
        AttributionError: if a layer holds shares that ``fully_shard`` does not gather, or one that is split twice.
    """
    covered = {inner for layer in module.modules() if _is_fully_sharded(layer) for inner in layer.modules()}
    for prefix, layer in module.named_modules():
        for local, p, placements in ((local, p, p.placements) for local, p in _shares(layer)):
            if layer not in covered or sum(not placement.is_replicate() for placement in placements) > 1:
                raise AttributionError(
                    f"Expected the parameters of {type(module).__name__} to be whole, or divided by `fully_shard` over "
                    f"the processes of data parallelism, but `{f'{prefix}.{local}'.lstrip('.')}` of shape "
                    f"{tuple(p.shape)} is a DTensor of another kind ({', '.join(map(str, placements))}): with tensor "
                    "parallelism no process has the whole activations of a sample. Divide the module by `fully_shard` "
                    "alone, in `configure_model`."
                )


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Have a module as one process without ``fully_shard`` has it: all processes enter together.

    Each gathers the parameters, one after the other, in the dtype in which the optimizer changes them, and keeps all of
    them until the end; the module runs without the hooks that gather and free them. In the end all is as before, with
    the same bits: what was written to whole parameters is gone.
    """
    layers: list[Any] = [layer for layer in module.modules() if _is_fully_sharded(layer)]
    gathered = [layer for layer in layers if _left_gathered(layer)]
    places = [(layer._parameters, local, p) for layer in module.modules() for local, p in _shares(layer)]
    whole: dict[int, nn.Parameter] = {}
    with ExitStack() as stack:
        for own, local, p in places:
            if id(p) not in whole:  # a tied one stays tied
                whole[id(p)] = nn.Parameter(_gathered(p), requires_grad=p.requires_grad)
            stack.callback(own.__setitem__, local, p)
        for own, local, p in places:
            own[local] = whole[id(p)]
        for layer in layers:
            stack.enter_context(_plain(layer))
        yield
    for divided in gathered:  # not after an error, which another process may not have had
        divided.unshard()


def _is_share(p: Any) -> bool:
    """Whether a tensor is a DTensor: torch need not have been built with them."""
    return hasattr(p, "full_tensor")


def _shares(layer: nn.Module) -> list[tuple[str, Any]]:
    """A layer's own parameters of which this process has a share."""
    return [(local, p) for local, p in layer._parameters.items() if _is_share(p)]


def _is_fully_sharded(layer: nn.Module) -> bool:
    return any(cls.__module__.startswith(_FSDP) and cls.__name__ == "FSDPModule" for cls in type(layer).__mro__)


def _left_gathered(layer: Any) -> bool:
    """Whether a forward pass without a backward pass has left a layer's parameters gathered; now they are shares."""
    before = list(layer.parameters())
    layer.reshard()
    return any(one is not other for one, other in zip(before, layer.parameters(), strict=True))


def _gathered(share: Any) -> Tensor:
    """All shares of a parameter, on the device where processes exchange them; they may wait elsewhere."""
    with torch.no_grad():
        whole: Tensor = share.detach().to(share.device_mesh.device_type).full_tensor()
        own = share.to_local().untyped_storage().data_ptr()
        return whole.clone() if whole.untyped_storage().data_ptr() == own else whole  # of one process: the share itself


@contextmanager
def _plain(layer: nn.Module) -> Iterator[None]:
    """Take away what ``fully_shard`` has put on a layer: its class and its hooks."""
    divided_class: Any = type(layer)
    hooks = [(own, dict(own)) for own in (layer._forward_pre_hooks, layer._forward_hooks)]
    layer.__class__ = divided_class.__bases__[1]
    for own, before in hooks:
        for number, hook in before.items():
            if getattr(hook, "__module__", "").startswith(_FSDP):
                del own[number]
    try:
        yield
    finally:
        layer.__class__ = divided_class
        for own, before in hooks:
            added = {number: hook for number, hook in own.items() if number not in before}
            own.clear()
            own.update({**before, **added})
