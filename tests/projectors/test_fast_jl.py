"""The projector around fast-jl, with a stand-in for its kernel; the kernel itself needs a CUDA device."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightning_attr.errors import AttributionError, MissingDependencyError
from lightning_attr.gradients import OuterSum
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import FastJLProjector, fast_jl, projector_from_config

LAYOUT = ParameterLayout({"weight": (6, 9), "bias": (6,)})


class Kernel:
    """What the kernel is documented to do: signs from a seed, whole blocks of rows, float16 inputs."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.largest = 0.0

    def __call__(self, values: Tensor, proj_dim: int, seed: int, num_sms: int) -> Tensor:
        assert values.shape[0] == self.rows
        assert values.is_contiguous()
        self.largest = max(self.largest, float(values.abs().max()))
        generator = torch.Generator().manual_seed(seed + num_sms)
        signs = 2 * torch.randint(2, (values.shape[1], proj_dim), generator=generator).float() - 1
        return values @ signs


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[int, Kernel]:
    made = {rows: Kernel(rows) for rows in (8, 16, 32)}
    module = SimpleNamespace(**{f"project_rademacher_{rows}": kernel for rows, kernel in made.items()})
    monkeypatch.setitem(sys.modules, "fast_jl", module)
    monkeypatch.setattr(fast_jl, "_check_device", lambda features: None)
    return made


def _features(projector: FastJLProjector, gradients: dict[str, Tensor], b: int) -> Tensor:
    projection = projector.bind(LAYOUT, "final")
    features = torch.zeros(b, projection.dim)
    for name, gradient in gradients.items():
        projection.accumulate(features, name, gradient)
    return features


def test_features_are_linear_and_keep_inner_products_on_average(kernels: dict[int, Kernel]) -> None:
    x, y = torch.randn(2, 60), torch.randn(2, 60)
    products = []
    for seed in range(200):
        projection = FastJLProjector(512, seed, num_sms=7).bind(ParameterLayout({"w": (60,)}), "final")
        features = [torch.zeros(2, 512) for _ in range(3)]
        for out, rows in zip(features, (x, y, 2 * x - y), strict=True):
            projection.accumulate(out, "w", rows)
        torch.testing.assert_close(features[2], 2 * features[0] - features[1], rtol=1e-4, atol=1e-4)
        products.append((features[0] * features[1]).sum(1))
    error = (torch.stack(products).mean(0) - (x * y).sum(1)).abs()
    spread = x.norm(dim=1) * y.norm(dim=1) * math.sqrt(2 / 512 / 200)
    assert (error < 4 * spread).all()


@pytest.mark.parametrize("rows", [8, 16, 32])
@pytest.mark.parametrize("b", [1, 8, 37])
def test_any_batch_split_gives_the_same_features(kernels: dict[int, Kernel], rows: int, b: int) -> None:
    gradients = {"weight": torch.randn(b, 6, 9), "bias": torch.randn(b, 6)}
    projector = FastJLProjector(512, num_sms=7, rows=rows)
    whole = _features(projector, gradients, b)
    one_by_one = [_features(projector, {n: g[i : i + 1] for n, g in gradients.items()}, 1) for i in range(b)]
    torch.testing.assert_close(whole, torch.cat(one_by_one), rtol=1e-5, atol=1e-5)


def test_factored_gradients_are_formed(kernels: dict[int, Kernel]) -> None:
    weight = OuterSum(torch.randn(3, 4, 6), torch.randn(3, 4, 9))
    projector = FastJLProjector(512, num_sms=7)
    torch.testing.assert_close(
        _features(projector, {"weight": weight}, 3),  # type: ignore[dict-item]
        _features(projector, {"weight": weight.materialise()}, 3),
    )


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e7])
def test_rows_are_scaled_into_the_range_of_float16(kernels: dict[int, Kernel], size: float) -> None:
    gradient = torch.randn(3, 6) * torch.tensor([[1.0], [1e-3], [0.0]])
    projector = FastJLProjector(512, num_sms=7)
    small, large = (_features(projector, {"bias": gradient * factor}, 3) for factor in (1.0, size))
    torch.testing.assert_close(large / size, small, rtol=1e-4, atol=1e-6)
    assert 2**12 < kernels[32].largest <= 2**14
    assert not large[2].any()


def test_large_parameters_go_in_parts_with_seeds_of_their_own(
    kernels: dict[int, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_jl, "_MOST_ENTRIES", 32 * 20)
    gradient = torch.zeros(1, 54)
    gradient[0, [3, 23]] = 1.0  # the same place in two parts
    features = _features(FastJLProjector(512, num_sms=7), {"weight": gradient.view(1, 6, 9)}, 1)
    assert set((features * math.sqrt(512)).round().int().flatten().tolist()) == {-2, 0, 2}


def test_matrix_depends_on_the_multiprocessors_and_they_are_recorded(kernels: dict[int, Kernel]) -> None:
    gradients = {"bias": torch.randn(2, 6)}
    some, others = FastJLProjector(512, num_sms=7), FastJLProjector(512, num_sms=8)
    assert some.config == {"kind": "fast_jl", "proj_dim": 512, "seed": 0, "num_sms": 7, "rows": 32}
    assert not torch.allclose(_features(some, gradients, 2), _features(others, gradients, 2))
    again = projector_from_config(some.config)
    assert isinstance(again, FastJLProjector)
    torch.testing.assert_close(_features(again, gradients, 2), _features(some, gradients, 2))


def test_multiprocessors_are_those_of_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    assert FastJLProjector(512).config["num_sms"] == 132


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, kernels: dict[int, Kernel]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AttributionError, match=r"needs a CUDA device, but there is none\. Use RademacherProjector"):
        _ = FastJLProjector(512).config


def test_gradients_on_the_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_jl", SimpleNamespace(project_rademacher_32=Kernel(32)))
    with pytest.raises(AttributionError, match="CUDA devices only, but the gradients are on cpu"):
        _features(FastJLProjector(512, num_sms=7), {"bias": torch.ones(1, 6)}, 1)


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_jl", None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-build-isolation \"lightning_attr\[fast\]\""):
        FastJLProjector(512, num_sms=7).bind(LAYOUT, "final")


@pytest.mark.parametrize("proj_dim", [1, 500, 2000])
def test_proj_dim_must_be_a_multiple_of_512(proj_dim: int) -> None:
    with pytest.raises(ValueError, match=f"`proj_dim` to be a multiple of 512, but got {proj_dim}"):
        FastJLProjector(proj_dim)


def test_rows_must_be_one_of_the_kernels() -> None:
    with pytest.raises(ValueError, match="`rows` of FastJLProjector to be 8, 16 or 32, but got 64"):
        FastJLProjector(512, rows=64)
