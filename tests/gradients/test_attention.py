"""Attention by its explicit forward against its own forward and autograd, one sample after the other, in float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import check_gradients
from lightning_attr.gradients import hooked_gradients, materialise

B = 3


class Attention(nn.Module):
    """``nn.MultiheadAttention`` with inputs that need gradients, and its weights among the outputs."""

    def __init__(self, kind: str = "itself", masks: bool = False, call: dict[str, Any] | None = None, **settings: Any):
        super().__init__()
        self.kind = kind
        self.masks = masks
        self.call = call or {}
        self.first = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, **settings)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        inputs = {"itself": (h, h, h), "other": (h[:, :3], h, h), "three": (h[:, :3], h, 2 * h)}[self.kind]
        if self.attention.kdim != 4:
            inputs = (inputs[0], x, x[..., :2])
        call = dict(self.call)
        if self.masks:
            call["key_padding_mask"] = x[..., 0] > 1
            call["attn_mask"] = torch.ones(inputs[0].shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if call.get("attn_mask") is not None and call["attn_mask"].ndim == 3:
            call["attn_mask"] = call["attn_mask"].to(x).repeat(len(x), 1, 1)
        if not self.attention.batch_first:
            h = inputs[0].transpose(0, 1)
            others = (y.transpose(0, 1) for y in inputs[1:])
            inputs = (h, h, h) if self.kind == "itself" and self.attention.kdim == 4 else (h, *others)
        output, weights = self.attention(*inputs, **call)
        output = output if self.attention.batch_first else output.transpose(0, 1)
        flat = output.flatten(1)
        return flat if weights is None else torch.cat([flat, weights.flatten(1)], dim=1)


def _x() -> Tensor:
    x = torch.randn(B, 5, 3, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0] = 0  # the first key is never masked
    return x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["itself", "other", "three"])
@pytest.mark.parametrize("call", [{}, {"need_weights": False}, {"average_attn_weights": False}], ids=str)
def test_packed_projections(kind: str, batch_first: bool, bias: bool, call: dict[str, bool]) -> None:
    check_gradients(Attention(kind, call=call, batch_first=batch_first, bias=bias), _x())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_separate_projections(batch_first: bool, bias: bool) -> None:
    check_gradients(Attention("other", kdim=3, vdim=2, batch_first=batch_first, bias=bias), _x())


MASKS: dict[str, dict[str, Any]] = {
    "float": {"attn_mask": torch.linspace(-1, 1, 25).double().reshape(5, 5)},
    "a head each": {"attn_mask": torch.linspace(-1, 1, 50).double().reshape(2, 5, 5)},
    "causal": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "is_causal": True},
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, need_weights: bool) -> None:
    check_gradients(Attention(call={**MASKS[mask], "need_weights": need_weights}, batch_first=True), _x())


@pytest.mark.parametrize("kind", ["itself", "other"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.filterwarnings("ignore:Converting mask without torch.bool dtype to bool")
def test_padding_and_causal_masks_together(kind: str, need_weights: bool) -> None:
    check_gradients(Attention(kind, masks=True, call={"need_weights": need_weights}, batch_first=True), _x())


@pytest.mark.parametrize("frozen", ["attention.in_proj", "attention.out_proj", "first", "attention"])
def test_partly_frozen(frozen: str) -> None:
    module = Attention()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    check_gradients(module, _x())


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer(norm_first: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Transformer(4, 2, 1, 1, 8, batch_first=True, norm_first=norm_first)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x, x[:, :3] * 2, src_key_padding_mask=x[..., 1] > 2)

    with pytest.warns(UserWarning, match="enable_nested_tensor") if norm_first else _nothing():
        model = Model()
    x = torch.cat([_x(), torch.zeros(B, 5, 1)], dim=2)
    x[0, 4, 1] = 3  # one key of one sample is padding
    check_gradients(model, x)


def _nothing() -> Any:
    return nullcontext()


@pytest.mark.parametrize("settings", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_what_the_explicit_forward_does_not_cover_is_left_to_the_fallback(settings: dict[str, bool]) -> None:
    module, x = Attention(batch_first=True, **settings), _x()
    seen: list[str] = []
    names = [name for name, _ in module.named_parameters()]
    skipped: set[str] = set()
    output = hooked_gradients(module, lambda: module(x).sum(1), B, names, lambda name, g: seen.append(name), skipped)
    assert seen == ["first.weight", "first.bias"]
    assert skipped == {"attention.out_proj.weight", "attention.out_proj.bias"}  # the others are seen not to come
    torch.testing.assert_close(output, module(x).sum(1).detach())


def test_dropout_stays() -> None:
    layer = nn.MultiheadAttention(4, 2, dropout=0.999).train()
    x = torch.randn(5, B, 4)
    output = hooked_gradients(layer, lambda: layer(x, x, x)[0].sum((0, 2)), B, ["in_proj_weight"], lambda name, g: None)
    kept = layer.eval()(x, x, x)[0].sum((0, 2))
    assert not torch.allclose(output, kept)


def test_the_forward_is_as_before_in_the_end() -> None:
    module, x = Attention(), _x()
    with pytest.raises(KeyError, match="planted"):
        hooked_gradients(module, lambda: {}["planted"], B, ["attention.in_proj_weight"], lambda name, g: None)
    assert "forward" not in vars(module.attention)
    hooked_gradients(module, lambda: module(x).sum(1), B, ["attention.in_proj_weight"], lambda name, g: None)
    assert "forward" not in vars(module.attention)


def test_a_forward_that_somebody_else_has_put_in_its_place_is_left_alone() -> None:
    module, x = Attention(), _x()
    own = type(module.attention).forward.__get__(module.attention)
    module.attention.forward = own
    seen: list[str] = []
    names = ["attention.in_proj_weight", "first.weight"]
    hooked_gradients(module, lambda: module(x).sum(1), B, names, lambda name, g: seen.append(name))
    assert seen == ["first.weight"]
    assert vars(module.attention)["forward"] is own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    module, x = Attention(batch_first=True).to(dtype), _x().to(dtype)
    found: dict[str, Tensor] = {}
    names = [name for name, _ in module.named_parameters()]

    def keep(name: str, gradient: Any) -> None:
        found[name] = materialise(gradient, tuple(module.get_parameter(name).shape))

    hooked_gradients(module, lambda: module(x).float().sum(1), B, names, keep)
    module, x = module.double(), x.double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for i in range(B):
        rows = torch.autograd.grad(module(x[i : i + 1]).sum(), list(module.parameters()))
        for name, row in zip(names, rows, strict=True):
            assert found[name].dtype == torch.float32
            assert (found[name][i] - row).norm() <= tolerance * row.norm() + 1e-4
