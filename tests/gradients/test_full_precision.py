"""Checks of a module work with all digits, whatever `torch.set_float32_matmul_precision` lets in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cases import BlobClassifier, blobs
from lightning_attr.features.featurizer import plan
from lightning_attr.gradients.full_precision import full_precision

NEWER = hasattr(torch._C, "_get_fp32_precision_getter")
PRODUCTS = [(backend, kind) for backend in ("cuda", "mkldnn") for kind in ("matmul", "conv", "rnn")]


def _asked(setting: str) -> object:
    try:
        return torch.get_float32_matmul_precision() if setting == "matmul" else torch.backends.cudnn.allow_tf32
    except RuntimeError:  # of a mixture of older and newer settings
        return "mixed"


def settings() -> list[object]:
    newer = [torch._C._get_fp32_precision_getter(*product) for product in PRODUCTS] if NEWER else []
    return [_asked("matmul"), _asked("cudnn"), *newer]


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    before = settings()
    yield
    if NEWER:
        torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for product, precision in zip(PRODUCTS, before[2:], strict=False):
        torch._C._set_fp32_precision_setter(*product, precision)
    assert settings() == before


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_older_settings_come_back(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = settings()
    with full_precision():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        assert set(settings()[2:]) <= {"ieee"}
    assert settings() == before


@pytest.mark.skipif(not NEWER, reason="torch before 2.9 has the older settings only")
def test_newer_settings_come_back_and_follow_the_general_one_as_before() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.fp32_precision = "tf32"
    before = settings()
    assert "mixed" in before
    with full_precision():
        assert set(settings()[2:]) == {"ieee"}
    assert settings() == before
    assert torch.backends.mkldnn.conv.fp32_precision == "tf32"
    torch.backends.fp32_precision = "none"
    assert torch.backends.mkldnn.conv.fp32_precision == "none"


class Rounded(BlobClassifier):
    """Rounds its products as tensor cores do, where the settings of torch let them."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.get_float32_matmul_precision() == "highest":
            return super().forward(x)
        layer = self.network[0]
        noise = 1e-2 * (len(x) + torch.arange(len(x)))[:, None]  # as another order of sums for each size of a batch
        return self.network[1:](nn.functional.linear(x * (1 + noise), layer.weight, layer.bias))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_rounded_products_are_no_dependence_between_samples(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    found = plan(Rounded(), blobs(4).tensors, 4)
    assert set(found.hooked) == {name for name, _ in Rounded().named_parameters()}
    assert torch.get_float32_matmul_precision() == precision
