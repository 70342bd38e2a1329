"""Which parameters become blocks, and how flat vectors become matrices and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_attr.curvature.kronecker_layout import KroneckerBlock, KroneckerLayout
from lightning_attr.errors import UnsupportedLayerError
from lightning_attr.gradients import HookedGradients, materialise


class Conv1D(nn.Module):
    """The layer of transformers, by its qualified name."""

    __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


LAYERS = [
    (nn.Linear(3, 2), (4, 3)),
    (nn.Linear(3, 2, bias=False), (4, 3)),
    (Conv1D(3, 2), (4, 5, 3)),
    (nn.Conv1d(4, 6, 3), (4, 4, 7)),
    (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 5, 5)),
    (nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 4, 5, 5)),
    (nn.Conv3d(2, 3, 2, stride=2), (4, 2, 5, 4, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_factors_multiply_to_the_gradient(layer: Any, shape: tuple[int, ...]) -> None:
    layer = layer.double()
    layout = KroneckerLayout.of(layer)
    (block,) = layout.blocks
    found: dict[str, Any] = {}
    x = torch.randn(shape, dtype=torch.float64)
    HookedGradients(layer, layout.names, direct=())(lambda: layer(x).square().flatten(1).sum(1), 4, found.update)
    rows, columns = block.factors(found["weight"], slice(1, 4))
    flat = {name: materialise(found[name], layout.parameters.shapes[name]).flatten(1)[1:4] for name in block.names}
    matrices = block.matrices(flat)
    assert rows.shape[:2] == columns.shape[:2] == (3, block.groups)
    assert torch.allclose(rows.mT @ columns, matrices, rtol=1e-12)
    back = block.vectors(matrices)
    assert all(torch.equal(back[name], flat[name]) for name in block.names)
    if block.bias is not None:
        assert torch.equal(matrices[..., -1].flatten(1), flat["bias"])


def test_attention_is_covered() -> None:
    module = nn.MultiheadAttention(4, 2)
    assert KroneckerLayout.of(module).share == 1
    apart = KroneckerLayout.of(nn.MultiheadAttention(4, 2, kdim=3, vdim=5))
    assert set(apart.uncovered) == {"in_proj_bias"}
    x = torch.randn(3, 2, 4)
    found: list[Any] = []
    layout = KroneckerLayout.of(module)
    HookedGradients(module, layout.names, direct=())(lambda: module(x, x, x)[0].sum((0, 2)), 2, found.append)
    gradients = {name: gradient for part in found for name, gradient in part.items()}
    for block in layout.blocks:
        flat = {name: materialise(gradients[name], layout.parameters.shapes[name]).flatten(1) for name in block.names}
        rows, columns = block.factors(gradients[block.weight], slice(None))
        assert torch.allclose(rows.mT @ columns, block.matrices(flat), atol=1e-6)


def test_what_is_not_covered_is_named() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.ConvTranspose1d(1, 1, 2), nn.Linear(2, 2))
    module[3].weight.requires_grad_(False)
    layout = KroneckerLayout.of(module)
    assert layout.names == ("0.weight", "0.bias")
    assert layout.uncovered == ("1.weight", "1.bias", "2.weight", "2.bias", "3.bias")
    assert layout.share == 8 / 17


def test_frozen_bias_is_no_column() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert KroneckerLayout.of(layer).blocks == (KroneckerBlock("weight", None, (2, 3)),)


def test_shared_weights_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    layout = KroneckerLayout.of(module)
    assert [block.weight for block in layout.blocks] == ["2.weight"]
    module[2].bias = module[1].bias
    assert KroneckerLayout.of(module).blocks == (KroneckerBlock("2.weight", None, (3, 3)),)


def test_what_the_plan_excludes_is_left_out() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    names = [name for name, _ in module.named_parameters()]
    layout = KroneckerLayout.of(module, hooked=names[2:], direct=["2.weight"])
    assert layout.names == ("1.weight", "1.bias")


def test_module_without_layers_is_refused() -> None:
    with pytest.raises(
        UnsupportedLayerError, match=r"Sequential has no layer with Kronecker factors: .* are `0.weight`"
    ):
        KroneckerLayout.of(nn.Sequential(nn.LayerNorm(3), nn.ReLU()))
    many = nn.Sequential(*[nn.LayerNorm(2) for _ in range(3)])
    with pytest.raises(UnsupportedLayerError, match=r"`1.bias` and 2 more\. Use another curvature"):
        KroneckerLayout.of(many)
