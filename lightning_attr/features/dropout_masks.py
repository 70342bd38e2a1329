"""Dropout whose masks are fixed: many networks from one, for ensembles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_attr.arguments.checks import check_instance, check_seed
from lightning_attr.randomness.streams import random_words

ELEMENTWISE = (nn.Dropout,)
CHANNELWISE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_OTHERS = (nn.AlphaDropout, nn.FeatureAlphaDropout, nn.MultiheadAttention, nn.RNNBase)  # with a dropout of their own


@contextmanager
def dropout_ensemble(module: nn.Module, seed: int) -> Iterator[list[str]]:
    r"""Give every ``nn.Dropout`` of a module one fixed mask: a member of a dropout ensemble (Deng et al., 2024).

    Inside, the module is one coherent sub-network for all samples, for training and targets alike: a dropped unit is
    dropped for each of them, and the others are multiplied with :math:`1 / (1 - p)`. Other seeds give other members.
    A mask depends on the seed, the module's name and the shape of one sample, not on the batch or the device.

    Covered are ``nn.Dropout`` (a mask of the shape of one sample: the input's without its first dimension) and
    ``nn.Dropout1d`` to ``3d`` (of its channels). Dropout inside ``nn.MultiheadAttention``, recurrent layers and
    ``nn.AlphaDropout`` stays off; their names are yielded. Functional dropout (``F.dropout``, the ``dropout_p`` of
    ``scaled_dot_product_attention``) cannot be seen from outside: in evaluation mode it is off too.

    Args:
        module: in evaluation mode: the masks replace what its dropout layers do there, which is nothing.
        seed: of the member.

    Yields:
        The names of the layers in it whose dropout is not covered.

    Raises:
        ValueError: if a dropout layer is in training mode, or none of positive rate is covered.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 100), nn.Dropout(0.3)).eval()
        >>> x = torch.ones(5, 2)
        >>> with dropout_ensemble(model, seed=0) as not_covered:
        ...     outputs = model(x)
        >>> bool((outputs[0] == outputs[4]).all()), bool((outputs == 0).any()), bool((model(x) == 0).any())
        (True, True, False)
    """
    check_instance("dropout_ensemble", "module", module, nn.Module, "an nn.Module")
    check_seed("dropout_ensemble", seed)
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, (*ELEMENTWISE, *CHANNELWISE)) and layer.p > 0
    }
    others = [name for name, layer in module.named_modules() if isinstance(layer, _OTHERS) and _rate(layer) > 0]
    if not layers:
        raise ValueError(
            f"Expected argument `module` to have a dropout layer (nn.Dropout, nn.Dropout1d to 3d) of a rate above 0, "
            f"but {type(module).__name__} has none"
            + (f"; the dropout inside {others} is not covered." if others else ". Functional dropout is not covered.")
        )
    training = [name for name, layer in layers.items() if layer.training]
    if training:
        raise ValueError(
            f"Expected argument `module` to be in evaluation mode, but its dropout layers {training[:5]} are in "
            "training mode. Call `module.eval()` before: the fixed masks work there."
        )
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(_masking(name, layer, seed))
            stack.callback(handle.remove)
        yield others


def _masking(name: str, layer: Any, seed: int) -> Callable[..., Tensor]:
    masks: dict[tuple[int, ...], Tensor] = {}

    def mask_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        shape = _mask_shape(layer, output)
        if shape not in masks or masks[shape].device != output.device:
            masks[shape] = _mask(shape, layer.p, seed, name).to(output.device)
        return output * masks[shape].to(output.dtype)

    return mask_output


def _mask_shape(layer: nn.Module, x: Tensor) -> tuple[int, ...]:
    if isinstance(layer, CHANNELWISE):
        return (x.shape[1], *[1] * (x.ndim - 2))
    return tuple(x.shape[1:])


def _mask(shape: tuple[int, ...], rate: float, seed: int, name: str) -> Tensor:
    """Zeros with the rate's probability, and what keeps the mean elsewhere; float32, on the CPU."""
    words = random_words(int(np.prod(shape, dtype=np.int64)), seed, "dropout", name)
    kept = words >= np.uint64(min(int(rate * 2.0**64), 2**64 - 1))
    return torch.from_numpy(kept).reshape(shape).float() / max(1 - rate, torch.finfo(torch.float32).tiny)


def _rate(layer: Any) -> float:
    return float(layer.p if hasattr(layer, "p") else layer.dropout)
