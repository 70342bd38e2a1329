"""What a batch is made of: what is told apart, and what is not."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attr.data.descriptions import form, same_form

X, Y = torch.ones(2, 3), torch.zeros(2)


@dataclass
class Sample:
    x: Tensor
    y: Tensor | None


class Graphs:
    """Knows its entries by name, and is no mapping."""

    def __init__(self, **entries: Any) -> None:
        self.entries = entries

    def keys(self) -> list[str]:
        return [*self.entries]

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (X, "Tensor"),
        ([X, Y], "[Tensor, Tensor]"),
        ((X, None), "(Tensor, NoneType)"),
        ({"x": X, "y": [X, Y]}, '{"x": Tensor, "y": [Tensor, Tensor]}'),
        (Sample(X, None), 'Sample("x": Tensor, "y": NoneType)'),
        (Graphs(x=X), 'Graphs("x": Tensor)'),
        (Pair(X, "a"), 'Pair("x": Tensor, "y": str)'),
        ([X] * 13, "[" + "Tensor, " * 12 + "...]"),
        ([[[[X]]]], "[[[list]]]"),
    ],
)
def test_form(batch: Any, text: str) -> None:
    assert form(batch) == text


@pytest.mark.parametrize(
    ("batch", "model", "same"),
    [
        ([X, Y], [X, Y], True),
        ((X, Y), [X, Y], True),
        ([X], [X, Y], False),
        ([X, Y, Y], [X, Y], False),
        (X, [X, Y], False),
        ([X, Y], X, False),
        ([X, None], [X, Y], False),
        ({"x": X}, {"x": X, "y": Y}, False),
        ({"x": X, "y": Y, "id": 3}, {"x": X, "y": Y}, True),
        ({"x": X, "y": None}, {"x": X, "y": Y}, False),
        (Sample(X, None), Sample(X, Y), False),
        (Sample(X, Y), Sample(X, Y), True),
        (Graphs(x=X), Graphs(x=X, y=Y), False),
        (Pair(X, Y), Pair(X, Y), True),
        ([X, [{"box": X}] * 3], [X, [{"box": X}]], True),  # as many boxes as there are
        ([X, [{"id": X}]], [X, [{"box": X}]], False),
        ([X, []], [X, [Y]], True),
    ],
)
def test_same_form(batch: Any, model: Any, same: bool) -> None:
    assert same_form(batch, model) is same
