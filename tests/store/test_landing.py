"""Batches from the CPU go on at once, in the order in which they come; what comes from a device is tested on one."""

from __future__ import annotations

from typing import Any

import torch

from lightning_attr.store.landing import Landing, _Flight


def test_batches_of_the_cpu_are_put_at_once() -> None:
    seen: list[Any] = []
    landing = Landing(lambda rows, columns: seen.append((rows, columns)))
    columns = {"features": torch.randn(2, 3, requires_grad=True)}
    landing.add([4, 5], columns)
    ((rows, found),) = seen
    assert rows == [4, 5]
    assert found["features"].data_ptr() == columns["features"].data_ptr()
    assert not found["features"].requires_grad
    landing.finish()
    assert len(seen) == 1


def test_columns_are_settled_before_they_are_put() -> None:
    seen: list[Any] = []
    landing = Landing(lambda rows, columns: seen.append(columns["loss"].tolist()))
    landing.add([0], {"loss": torch.ones(1)}, lambda columns: {"loss": columns["loss"] + 1})
    assert seen == [[2.0]]


def test_columns_of_all_dtypes_go_through_one_piece_of_memory() -> None:
    columns = {
        "features": torch.randn(3, 5).half(),
        "label": torch.tensor([7, 2**60, -1]),
        "loss": torch.randn(3),
        "second_features": torch.randn(3, 2, 5).transpose(0, 1).contiguous().transpose(0, 1),
        "output": torch.randn(3, dtype=torch.float64),
    }
    flight = _Flight.begin([0, 1, 2], columns, None)
    found = flight.end()
    assert found.keys() == columns.keys()
    assert all(torch.equal(found[name], values) for name, values in columns.items())
    whole = flight.bytes.untyped_storage()._cdata
    assert [name for name, v in found.items() if v.untyped_storage()._cdata == whole] == ["features"]
