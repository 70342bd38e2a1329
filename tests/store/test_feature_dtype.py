"""Half precision: what comes back is right to the last kept digit, and what does not fit is kept in float32."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from lightning_attr.store.feature_dtype import (
    check_columns,
    check_feature_dtype,
    decode,
    decode_features,
    encode,
    row_bytes,
    senseless,
)

ROWS, DIM = 40, 33
DIGITS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0.0}


def features(seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(seed))


def stored(values: Tensor, feature_dtype: str = "float16") -> dict[str, Tensor]:
    return encode({"features": values, "loss": torch.ones(len(values))}, feature_dtype)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 65504.0, 1e9, 1e30])
@pytest.mark.parametrize("feature_dtype", DIGITS)
def test_every_feature_is_right_to_the_digits_of_its_dtype(feature_dtype: str, size: float) -> None:
    values = features(size=size)
    columns = stored(values, feature_dtype)
    assert columns["features"].dtype == getattr(torch, feature_dtype)
    assert ("features_scale" in columns) == (feature_dtype == "float16")
    found = decode_features(columns)
    assert found.dtype == torch.float32
    error = (found.double() - values.double()).abs()
    assert (error <= DIGITS[feature_dtype] * values.double().abs()).all()
    assert error.any() == (feature_dtype != "float32")


def test_the_scale_is_exact_and_leaves_room() -> None:
    for largest in (1.0, 1.9999, 2.0, 3e-7, 65504.0, 65536.0, 3.4e38, 2.0**-100):
        columns = stored(torch.tensor([[largest, -largest / 3]]))
        assert math.frexp(columns["features_scale"].item())[0] == 0.5  # a power of two
        assert 2**14 <= columns["features"].abs().max() <= 2**15
        assert columns["features_scale"].dtype == torch.float32


def test_whole_numbers_come_back_exactly() -> None:
    values = torch.arange(-1024.0, 1024.0).view(32, 64)
    assert torch.equal(decode_features(stored(values)), values)


def test_small_features_of_a_row_lose_digits_as_documented() -> None:
    values = torch.tensor([[1.0, 2.0**-28 * 1.5, 2.0**-38, 2.0**-41]])
    found = decode_features(stored(values))[0].tolist()
    assert found[:2] == values[0, :2].tolist()
    assert abs(found[2] - 2.0**-38) <= 2.0**-39
    assert found[3] == 0


@pytest.mark.parametrize("small", [2.0**-30, 1e-12, 1e-38, 1e-44])
def test_a_row_that_would_be_lost_keeps_the_shard_in_float32(small: float) -> None:
    values = torch.tensor([[1.0, 0.5], [small, small / 3], [0.0, 0.0]])
    columns = stored(values)
    assert columns.keys() == {"features", "loss"}
    assert columns["features"].dtype == torch.float32
    assert torch.equal(decode_features(columns), values)


@pytest.mark.parametrize("small", [2.0**-28, 2.0**-20])
def test_a_small_row_that_fits_is_not_lost(small: float) -> None:
    values = torch.tensor([[1.0, 0.5], [small, small / 3]])
    columns = stored(values)
    assert columns["features"].dtype == torch.float16
    error = (decode_features(columns) - values).abs()
    assert (error <= 2.0**-11 * values.amax(1, keepdim=True)).all()


@pytest.mark.parametrize("values", [torch.full((1, 2), 3.4e38), torch.full((1, 2), 1e-39)], ids=["large", "small"])
def test_what_bfloat16_does_not_hold_stays_float32(values: Tensor) -> None:
    assert torch.equal(decode_features(stored(values, "bfloat16")), values)
    assert stored(values, "bfloat16")["features"].dtype == torch.float32


def test_what_is_too_small_for_a_scale_stays_float32() -> None:
    values = torch.tensor([[1e-40, 3e-41]])
    assert stored(values)["features"].dtype == torch.float32
    assert torch.equal(decode_features(stored(values)), values)


@pytest.mark.parametrize("feature_dtype", ["float16", "bfloat16"])
def test_zeros_are_zeros(feature_dtype: str) -> None:
    columns = stored(torch.zeros(3, 2), feature_dtype)
    assert columns["features"].dtype == getattr(torch, feature_dtype)
    assert torch.equal(decode_features(columns), torch.zeros(3, 2))


@pytest.mark.parametrize("feature_dtype", DIGITS)
def test_only_float32_features_change(feature_dtype: str) -> None:
    columns = {"features": features().double(), "loss": torch.rand(ROWS), "label": torch.arange(ROWS)}
    assert encode(columns, feature_dtype) == columns
    single = {**columns, "features": features()}
    before = {name: values.clone() for name, values in single.items()}
    decoded = decode(encode(single, feature_dtype))
    assert list(decoded) == list(single)
    assert decoded["loss"] is single["loss"]
    assert decoded["label"] is single["label"]
    assert all(torch.equal(single[name], values) for name, values in before.items())
    assert encode({"loss": torch.ones(2)}, feature_dtype).keys() == {"loss"}


@pytest.mark.parametrize("feature_dtype", DIGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_bytes_are_those_that_are_stored(feature_dtype: str, dtype: torch.dtype) -> None:
    columns = {"features": features().to(dtype), "loss": torch.rand(ROWS), "label": torch.arange(ROWS)}
    written = encode(columns, feature_dtype)
    written.pop("features_scale", None)
    assert row_bytes(columns, feature_dtype) * ROWS == sum(values.nbytes for values in written.values())


@pytest.mark.parametrize("name", ["float8", "half", "", None, torch.float16])
def test_other_dtypes_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"`feature_dtype` of FeatureStore to be 'float16', .* or 'float32', but got "):
        check_feature_dtype(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", ["features", "loss"])
def test_nan_and_inf_are_refused_by_row(column: str, bad: float) -> None:
    columns = {"features": torch.ones(3, 2), "loss": torch.ones(3), "label": torch.arange(3)}
    check_columns(columns, range(16, 19))
    columns[column][1] = bad
    with pytest.raises(ValueError, match=f"Expected finite values in column '{column}', but row 17 holds NaN or Inf"):
        check_columns(columns, range(16, 19))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"features": torch.full((4, 3), torch.nan)}, "`features` holds NaN or Inf"),
        ({"features": torch.ones(4, 3, dtype=torch.int64)}, "`features` has the shape .* and the dtype torch.int64"),
        ({"loss": torch.ones(4, dtype=torch.complex64)}, "`loss` has the shape .* torch.complex64"),
        ({"features_scale": torch.ones(2)}, r"`features_scale` has the shape \(2,\)"),
        ({"features_scale": torch.tensor([-1.0])}, "`features_scale` is -1.0"),
        ({"features_scale": torch.tensor([3e38])}, r"`features_scale` is 3\.0"),
        ({"other_scale": torch.tensor(1.0)}, r"`other_scale` has the shape \(\)"),
        ({"second_rows": torch.tensor([4])}, "do not fit together"),
        ({"second_rows": torch.tensor([-1])}, "do not fit together"),
        ({"second_rows": torch.tensor([True])}, "`second_rows` has .* torch.bool"),
        ({"second_features": torch.ones(3, 2, 3)}, "do not fit together"),
        ({"second_features": torch.ones(1, 3)}, "do not fit together"),
    ],
)
def test_columns_that_nobody_can_have_written(changes: dict[str, torch.Tensor], problem: str) -> None:
    columns = {
        "features": torch.ones(4, 3, dtype=torch.float16),
        "features_scale": torch.ones(1),
        "loss": torch.ones(4),
        "second_features": torch.ones(1, 2, 3),
        "second_rows": torch.tensor([3]),
    }
    assert senseless(columns) is None
    assert senseless({"loss": torch.full((2,), 1.7e308, dtype=torch.float64)}) is None  # only its sum overflows
    assert re.search(problem, senseless({**columns, **changes}) or "")
    without = {name: values for name, values in columns.items() if name != "second_rows"}
    assert senseless(without) == "`second_features` and `second_rows` do not fit together"
