"""Leave no trace: run attribution beside training and put everything back, also after an exception."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_attr.user_code.calls import observed
from lightning_attr.user_code.generators import preserved_rng
from lightning_attr.user_code.reading_state import unchanged_data

__all__ = ["preserved_rng", "undisturbed"]


@contextmanager
def undisturbed(
    module: nn.Module,
    *data: object,
    beside: Mapping[str, object] | None = None,
    values: Callable[[], Mapping[str, Tensor]] | None = None,
) -> Iterator[None]:
    """Put the module into eval mode and restore it, and all randomness, in the end.

    Restored are the RNG streams of python, numpy and torch on every device, what ``data`` keep and change, each
    submodule's ``training`` flag, each parameter's ``requires_grad`` flag and ``grad``, the buffers, and all other
    state that is reached through the attributes of the module; parameters where :func:`user_call` has changed them.
    """
    modes = [(submodule, submodule.training) for submodule in module.modules()]  # a scripted one keeps its own
    with unchanged_data(*data), observed(module, beside, values):
        try:
            module.eval()
            for p in module.parameters():
                p.grad = None  # a gradient accumulated in place would change the one kept
            yield
        finally:
            for submodule, mode in modes:
                submodule.training = mode
