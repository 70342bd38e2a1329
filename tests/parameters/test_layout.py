"""The layout: which parameters, in which order, and a digest that changes when they do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_attr.parameters.layout import ParameterLayout


def _net() -> nn.Module:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.Linear(3, 5, bias=False))
    net[2].weight = net[0].weight
    net[1].bias.requires_grad_(False)
    return net


def test_trainable_parameters_in_order_with_tied_ones_once() -> None:
    layout = ParameterLayout.of(_net())
    assert list(layout.shapes.items()) == [("0.weight", (5, 3)), ("1.weight", (4, 3))]
    assert layout.numel == 27


def test_scalars_count() -> None:
    module = nn.Module()
    module.scale = nn.Parameter(torch.tensor(2.0))
    assert ParameterLayout.of(module).numel == 1


def test_all_frozen() -> None:
    expected = r"Expected Linear to have at least one parameter with requires_grad=True, but all are frozen"
    with pytest.raises(ValueError, match=expected):
        ParameterLayout.of(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match=r"Expected ReLU .*or there are none"):
        ParameterLayout.of(nn.ReLU())


def test_digest_tells_layouts_apart() -> None:
    layouts = [
        {"a": (2, 3), "b": (4,)},
        {"b": (4,), "a": (2, 3)},
        {"a": (3, 2), "b": (4,)},
        {"a": (6,), "b": (4,)},
        {"c": (2, 3), "b": (4,)},
        {"a": (2, 3)},
    ]
    assert len({ParameterLayout(shapes).digest for shapes in layouts}) == len(layouts)
    assert ParameterLayout({"a": (2, 3), "b": (4,)}).digest == ParameterLayout(layouts[0]).digest


def test_digest_never_changes() -> None:
    assert ParameterLayout({"weight": (2, 3), "bias": (2,)}).digest == "54edcd00dc22e3e9"


def test_values_do_not_matter() -> None:
    assert ParameterLayout.of(nn.Linear(2, 3)).digest == ParameterLayout.of(nn.Linear(2, 3)).digest
