"""Which parameters a module trains at a moment: fine-tuning freezes and unfreezes them while a run goes on."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.parameter import is_lazy


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name all parameters, frozen ones too: by them a model is known again.

    Returns parameter name -> shape, in ``named_parameters()`` order.

    Example:
        >>> parameter_shapes(nn.Linear(3, 2).requires_grad_(False))
        {'weight': (2, 3), 'bias': (2,)}
    """
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def parameter_count(module: nn.Module) -> int:
    """Count the entries of all parameters, frozen ones too.

    Returns how many there are; lazy parameters without a shape yet count as none.

    Example:
        >>> parameter_count(nn.Linear(3, 2).requires_grad_(False))
        8
    """
    return sum(p.numel() for p in module.parameters() if not is_lazy(p))


def trainable_names(module: nn.Module) -> tuple[str, ...] | None:
    """Name the parameters with ``requires_grad=True``.

    Returns their names; None for all.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> trainable_names(layer)
        >>> _ = layer.weight.requires_grad_(False)
        >>> trainable_names(layer)
        ('bias',)
    """
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    return None if all(flags.values()) else tuple(name for name, flag in flags.items() if flag)


def set_trainable(module: nn.Module, names: Collection[str] | None) -> None:
    """Set each parameter's ``requires_grad`` as it was at a snapshot.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> set_trainable(layer, ["weight"])
        >>> layer.bias.requires_grad
        False
    """
    wanted = None if names is None else frozenset(names)
    for name, p in module.named_parameters():
        p.requires_grad_(wanted is None or name in wanted)
