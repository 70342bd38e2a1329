"""Products in all digits of float32, while what a module computes is compared with itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

_PRODUCTS = [(backend, kind) for backend in ("cuda", "mkldnn") for kind in ("matmul", "conv", "rnn")]


@contextmanager
def full_precision() -> Iterator[None]:
    """Leave TF32 and bfloat16 out of float32 products, which ``torch.set_float32_matmul_precision`` lets in.

    Their rounding, a thousandth and more, looks like a sample that depends on those beside it.
    """
    matmul: str | None = None
    cudnn: bool | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 calls its older settings that, and mixed ones an error
        with suppress(RuntimeError):
            matmul = torch.get_float32_matmul_precision()
        with suppress(RuntimeError):
            cudnn = torch.backends.cudnn.allow_tf32
        newer = [(*product, _precision(*product)) for product in _PRODUCTS] if _has_newer() else []
        _set(None if matmul is None else "highest", None if cudnn is None else False)
        for backend, kind, _ in newer:
            _set_precision(backend, kind, "ieee")
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _set(matmul, cudnn)
            for backend, kind, precision in newer:
                _set_precision(backend, kind, "none")  # it follows the general setting, as it may have before
                if _precision(backend, kind) != precision:
                    _set_precision(backend, kind, precision)


def _set(matmul: str | None, cudnn: bool | None) -> None:
    """The settings that every torch has; None leaves one alone."""
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if cudnn is not None:
        torch.backends.cudnn.allow_tf32 = cudnn


def _has_newer() -> bool:
    """Whether torch has a setting for each backend and kind of product, as from 2.9 on."""
    return hasattr(torch._C, "_get_fp32_precision_getter")


def _precision(backend: str, kind: str) -> str:
    found: str = torch._C._get_fp32_precision_getter(backend, kind)
    return found


def _set_precision(backend: str, kind: str, precision: str) -> None:
    torch._C._set_fp32_precision_setter(backend, kind, precision)
