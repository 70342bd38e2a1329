"""What a sample is inside a batch, for every structure that a batch may have."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_attr.batches.nested import (
    batched_tensors,
    float_tensors,
    join_batches,
    map_tensors,
    replace_tensors,
    select_rows,
)

B = 4
X, Y = torch.arange(8.0).reshape(B, 2), torch.arange(B)
SHARED = torch.tensor([5.0, 6.0, 7.0])


class Pair(NamedTuple):
    x: Tensor
    extra: Any


@dataclass
class Record:
    x: Tensor
    inner: dict[str, Any]
    name: str = "record"


def _batches() -> dict[str, Any]:
    return {
        "tensor": X,
        "tuple": (X, Y),
        "list": [X, Y],
        "dict": {"x": X, "y": Y, "shared": SHARED, "scalar": torch.tensor(1.0)},
        "ordered dict": OrderedDict(x=X, y=Y),
        "named tuple": Pair(X, {"y": Y}),
        "dataclass": Record(X, {"y": Y, "shared": SHARED}),
        "nested": (X, {"a": [Y, (X, "text", None, 3)], "b": Record(X, {})}),
        "texts": {"x": X, "text": ["a", "b", "c", "d"], "ids": (1, 2, 3, 4)},
    }


BATCHES = list(_batches())


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Record):
        return _equal(vars(a), vars(b))
    return bool(a == b)


@pytest.mark.parametrize("kind", BATCHES)
def test_map_tensors_keeps_the_structure(kind: str) -> None:
    batch = _batches()[kind]
    assert _equal(map_tensors(batch, lambda t: t), batch)
    doubled = map_tensors(batch, lambda t: 2 * t)
    assert type(doubled) is type(batch)
    assert _equal(map_tensors(doubled, lambda t: t // 2), batch)


@pytest.mark.parametrize("kind", BATCHES)
def test_replace_puts_tensors_where_batched_found_them(kind: str) -> None:
    batch = _batches()[kind]
    tensors = batched_tensors(batch, B)
    assert all(len(t) == B for t in tensors)
    assert _equal(replace_tensors(batch, B, tensors), batch)
    changed = replace_tensors(batch, B, [t + 1 for t in tensors])
    assert _equal(map_tensors(changed, lambda t: t - 1 if t.shape[:1] == (B,) else t), batch)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("rows", [[2], [0, 1, 2, 3], [3, 1]])
def test_select_rows_takes_the_same_samples_everywhere(kind: str, rows: list[int]) -> None:
    batch = _batches()[kind]
    selected = select_rows(batch, B, rows)
    assert type(selected) is type(batch)
    expected = map_tensors(batch, lambda t: t[rows] if t.shape[:1] == (B,) else t)
    if kind == "texts":
        expected |= {"text": ["abcd"[row] for row in rows], "ids": tuple(row + 1 for row in rows)}
    assert _equal(selected, expected)


def test_a_pair_of_two_samples_is_no_list_of_samples() -> None:
    x, y = torch.randn(2, 3), torch.tensor([0, 1])
    assert _equal(select_rows((x, y), 2, [1]), (x[1:], y[1:]))
    assert _equal(select_rows((x, "ab"), 2, [1]), (x[1:], "ab"))


def test_a_named_tuple_of_plain_values_is_shared() -> None:
    class Sizes(NamedTuple):
        height: int
        width: int

    assert select_rows((torch.zeros(2), Sizes(3, 4)), 2, [0])[1] == Sizes(3, 4)


def test_nothing_is_changed_in_place() -> None:
    batch = _batches()["nested"]
    select_rows(batch, B, [1])
    replace_tensors(batch, B, [torch.zeros(1)] * 4)
    map_tensors(batch, torch.zeros_like)
    assert _equal(batch, _batches()["nested"])


def test_float_tensors() -> None:
    found = float_tensors({"a": X, "b": (Y, SHARED.half()), "c": "text"})
    assert [t.dtype for t in found] == [torch.float32, torch.float16]


@pytest.mark.parametrize("kind", [kind for kind in BATCHES if kind not in {"dataclass", "nested"}])
def test_joined_batches_are_the_batch_that_they_are_part_of(kind: str) -> None:
    batch = _batches()[kind]
    parts = [select_rows(batch, B, rows) for rows in ([0], [1, 2], [3])]
    joined = join_batches(parts, [1, 2, 1])
    assert type(joined) is type(batch)
    assert _equal(joined, batch)


@pytest.mark.parametrize(
    "others",
    [
        {"x": torch.ones(2, 4)},  # padded further
        {"x": torch.ones(2, 3).double()},
        {"x": torch.ones(2, 3), "more": 1},
        {"x": [1.0, 2.0]},
        {"x": torch.ones(3, 3)},  # three rows for two samples
        {"x": torch.ones(2, 3), "scale": torch.tensor(2.0)},
        {"x": torch.ones(2, 3), "name": "b"},
        {"x": torch.ones(2, 3), "pair": (torch.ones(2),)},
        {"x": torch.ones(2, 3), "record": Record(X, {})},
    ],
)
def test_batches_that_differ_in_more_than_their_samples_are_not_joined(others: dict[str, Any]) -> None:
    rest = {"scale": torch.tensor(1.0), "name": "a", "pair": (torch.ones(2), torch.ones(2)), "record": Record(X, {})}
    batch = {"x": torch.ones(2, 3), **{key: value for key, value in rest.items() if key in others}}
    with pytest.raises(ValueError, match="differ in nothing but their samples"):
        join_batches([batch, others], [2, 2])
