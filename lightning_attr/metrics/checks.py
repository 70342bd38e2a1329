"""Checks of what a metric gets: tensors that are finite, of the right shape, masks of two kinds."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_float, check_tensor


def check_finite(name: str, values: Tensor) -> None:
    """Refuse NaN and infinite values."""
    check_tensor(None, name, values)
    n_bad = int((~values.isfinite()).sum())
    if n_bad:
        raise ValueError(f"Expected argument `{name}` to be finite, but got {n_bad} NaN or infinite values.")


def check_matrix(name: str, values: Tensor) -> None:
    """Refuse what is no non-empty matrix."""
    check_tensor(None, name, values)
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(f"Expected argument `{name}` to be a non-empty matrix, but got shape {tuple(values.shape)}.")


def check_vector(name: str, values: Tensor, like: tuple[str, Tensor] | None = None) -> None:
    """Refuse what is no non-empty finite vector, or not as long as another."""
    check_tensor(None, name, values)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"Expected argument `{name}` to be a non-empty vector, but got shape {tuple(values.shape)}.")
    if like is not None and len(values) != len(like[1]):
        raise ValueError(
            f"Expected arguments `{like[0]}` and `{name}` to have the same length,"
            f" but got {len(like[1])} and {len(values)}."
        )
    check_finite(name, values)


def as_mask(name: str, mask: Tensor) -> Tensor:
    """Return a mask as bool, and refuse one that holds other values than 0 and 1."""
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"Expected argument `{name}` to be bool or hold only 0 and 1, but got {mask.dtype} values from"
            f" {mask.min().item()} to {mask.max().item()}. Pass one entry for each training sample, not indices."
        )
    return mask.bool()


def check_noise_update(self_influence: Tensor, noise_mask: Tensor) -> Tensor:
    """Return `noise_mask` as bool on the device of `self_influence`; any batch of samples will do."""
    check_vector("self_influence", self_influence)
    check_vector("noise_mask", noise_mask, like=("self_influence", self_influence))
    return as_mask("noise_mask", noise_mask).to(self_influence.device)


def check_noise(self_influence: Tensor, noise_mask: Tensor) -> Tensor:
    """Return `noise_mask` as above; neither recall nor AUROC exists without samples of both kinds."""
    noisy = check_noise_update(self_influence, noise_mask)
    if not 0 < int(noisy.sum()) < len(noisy):
        raise ValueError(
            "Expected argument `noise_mask` to mark some samples and leave others clean,"
            f" but got {int(noisy.sum())} marked out of {len(noisy)}."
        )
    return noisy


def check_fraction(fraction: float) -> None:
    """Refuse a share outside (0, 1]."""
    check_float(None, "fraction", fraction, above=0, maximum=1)
