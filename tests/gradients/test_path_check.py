"""Whole modules: whatever path the plan takes, the gradients are those of autograd, one sample after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from cases import LayersOf, StandardisedConv
from lightning_attr.errors import BatchDependenceError, NonFiniteGradientError, UnsupportedLayerError
from lightning_attr.gradients import (
    GradientPlan,
    HookedGradients,
    ParameterGradient,
    check_batch_independence,
    gradient_rule,
    loop_gradients,
    materialise,
    plan_gradients,
    vmap_gradients,
)
from lightning_attr.gradients.plain_execution import plain_execution

B = 4


def _frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def _tied(kind: str) -> nn.Module:
    if kind == "embedding":
        module = LayersOf(lambda m, x: m.b(m.a(x)), a=nn.Embedding(5, 3), b=nn.Linear(3, 5))
    else:
        module = LayersOf(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(3, 3), b=nn.Linear(3, 3, bias=False))
    module.b.weight = module.a.weight
    return module


def _no_grad(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = m.a(x)
    return m.b(x)


def _residual(m: nn.Module, x: Tensor) -> Tensor:
    h = F.relu(m.bn(m.conv(x)), inplace=True)
    h = h + F.relu(m.gn(m.conv2(h)), inplace=True)
    return m.head(h.mean(2))


def _attend(m: nn.Module, x: Tensor) -> Tensor:
    h = m.table(x)
    return m.attention(h, h, h, need_weights=False)[0]


def _fused_attention(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in m.qkv(x).chunk(3, dim=-1))
    return m.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def _overwrite(m: nn.Module, x: Tensor) -> Tensor:
    h = m.a(x)
    h[:, 0] = 0
    h.mul_(2)
    return m.b(h)


def _branch(m: nn.Module, x: Tensor) -> Tensor:
    h = _Product.apply(m.a(x), m.scale)
    return torch.cat([h[i : i + 1] * (2 if h[i].sum().item() > 0 else 1) for i in range(len(h))])


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class _Product(torch.autograd.Function):
    """What no mode sees."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return gradient * y, (gradient * x).sum_to_size(y.shape)


IDS = torch.tensor([[0, 1, 2], [3, 3, 4], [4, 0, 1], [2, 2, 2]])
FLAT = torch.randn(B, 3, generator=torch.Generator().manual_seed(1)).double()
SEQUENCE = torch.randn(B, 5, 4, generator=torch.Generator().manual_seed(2)).double()

HOOKED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "residual net": (
        lambda: LayersOf(
            _residual,
            conv=nn.Conv1d(5, 4, 3, padding=1),
            bn=nn.BatchNorm1d(4),
            conv2=nn.Conv1d(4, 4, 3, padding="same", padding_mode="circular"),
            gn=nn.GroupNorm(2, 4),
            head=nn.Linear(4, 2),
        ),
        SEQUENCE,
    ),
    "in-place after layers": (
        lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(True), nn.Linear(6, 6), nn.ReLU(True), LayersOf(lambda m, x: x)),
        FLAT,
    ),
    "in-place writes": (lambda: LayersOf(_overwrite, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), FLAT),
    "called several times": (lambda: LayersOf(lambda m, x: m.a(m.a(m.a(x).relu())), a=nn.Linear(3, 3)), FLAT),
    "called on parts": (lambda: LayersOf(lambda m, x: m.a(x[:, :2]) * m.a(x[:, 1:]), a=nn.Linear(2, 3)), FLAT),
    "called by keyword": (lambda: LayersOf(lambda m, x: m.a(input=x), a=nn.Linear(3, 3)), FLAT),
    "one layer under two names": (
        lambda: (lambda a: LayersOf(lambda m, x: m.b(m.a(x).tanh()), a=a, b=a))(nn.Linear(3, 3)),
        FLAT,
    ),
    "tied linears": (lambda: _tied("linear"), FLAT),
    "tied embedding and head": (lambda: _tied("embedding"), IDS),
    "frozen before trainable": (
        lambda: LayersOf(lambda m, x: m.b(m.a(x).relu_()), a=_frozen(nn.Linear(3, 4)), b=nn.Linear(4, 2)),
        FLAT,
    ),
    "frozen between trainable": (
        lambda: LayersOf(
            lambda m, x: m.c(m.b(m.a(x).tanh())), a=nn.Linear(3, 4), b=_frozen(nn.Linear(4, 4)), c=nn.Linear(4, 2)
        ),
        FLAT,
    ),
    "only biases": (
        lambda: (lambda a: (a.weight.requires_grad_(False), LayersOf(lambda m, x: m.a(x), a=a))[1])(nn.Linear(3, 4)),
        FLAT,
    ),
    "position ids of one row": (
        lambda: LayersOf(lambda m, x: m.a(x) + m.b(torch.arange(3)[None]), a=nn.Embedding(5, 4), b=nn.Embedding(3, 4)),
        IDS,
    ),
    "checkpointed": (
        lambda: LayersOf(
            lambda m, x: m.b(checkpoint(lambda h: m.a(h).tanh(), m.c(x), use_reentrant=False)),
            a=nn.Linear(4, 4),
            b=nn.Linear(4, 2),
            c=nn.Linear(3, 4),
        ),
        FLAT,
    ),
    "attention": (
        lambda: LayersOf(_attend, table=nn.Embedding(5, 4), attention=nn.MultiheadAttention(4, 2, batch_first=True)),
        IDS,
    ),
    "encoder layer": (
        lambda: LayersOf(
            lambda m, x: m.layer(m.embedding(x)),
            embedding=nn.Embedding(5, 4),
            layer=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        ),
        IDS,
    ),
    "encoder layer first": (
        lambda: LayersOf(lambda m, x: m.layer(x), layer=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)),
        SEQUENCE,
    ),
    "learned slope": (
        lambda: LayersOf(lambda m, x: m.act(m.a(x)), a=nn.Linear(3, 3), act=nn.PReLU()),
        FLAT,
    ),
    "encoder": (
        lambda: LayersOf(
            lambda m, x: m.encoder(x, src_key_padding_mask=x[..., 0] > 1.5),
            encoder=nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2),
        ),
        SEQUENCE,
    ),
    "scaled dot product attention": (
        lambda: LayersOf(_fused_attention, qkv=nn.Linear(4, 12), out=nn.Linear(4, 4)),
        SEQUENCE,
    ),
    "adapter of linear layers": (
        lambda: LayersOf(
            lambda m, x: m.base(x) + 2 * m.b(m.a(x)),
            base=_frozen(nn.Linear(3, 4)),
            a=nn.Linear(3, 2, bias=False),
            b=nn.Linear(2, 4, bias=False),
        ),
        FLAT,
    ),
    "checkpointed from the first layer": (
        lambda: LayersOf(
            lambda m, x: m.b(checkpoint(lambda h: m.a(h).tanh(), x, use_reentrant=False)),
            a=nn.Linear(3, 4),
            b=nn.Linear(4, 2),
        ),
        FLAT,
    ),
    "reentrant checkpoint": (
        lambda: LayersOf(
            lambda m, x: m.b(checkpoint(lambda h: m.a(h).tanh(), m.c(x), use_reentrant=True)),
            a=nn.Linear(4, 4),
            b=nn.Linear(4, 2),
            c=nn.Linear(3, 4),
        ),
        FLAT,
    ),
    "without gradient": (lambda: LayersOf(_no_grad, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), FLAT),
    "compiled": (lambda: torch.compile(LayersOf(lambda m, x: m.a(x), a=nn.Linear(3, 4)), backend="eager"), FLAT),
}

FALLBACK: dict[str, tuple[Callable[[], nn.Module], Tensor, set[str]]] = {
    "overridden convolution": (
        lambda: LayersOf(lambda m, x: m.a(x), a=StandardisedConv(5, 2, 3)),
        SEQUENCE,
        {"a.weight"},
    ),
    "as many positions as samples": (
        lambda: LayersOf(lambda m, x: m.a(x[:, :4].transpose(0, 1)).transpose(0, 1), a=nn.Linear(4, 2)),
        SEQUENCE,
        {"a.weight", "a.bias"},
    ),
    "positions merged into the batch": (
        lambda: LayersOf(lambda m, x: m.a(x.reshape(-1, 4)).reshape(len(x), -1), a=nn.Linear(4, 2)),
        SEQUENCE,
        {"a.weight", "a.bias"},
    ),
    "parameter in an unknown function": (
        lambda: LayersOf(lambda m, x: m.a(torch.cdist(x, m.centres)), a=nn.Linear(5, 2), centres=_parameter(5, 3)),
        FLAT,
        {"centres"},
    ),
    "parameter in a function of its own": (
        lambda: LayersOf(lambda m, x: _Product.apply(m.a(x), m.scale.exp()), a=nn.Linear(3, 2), scale=_parameter(2)),
        FLAT,
        {"scale"},
    ),
    "parameter on positions merged into the batch": (
        lambda: LayersOf(lambda m, x: (x.reshape(-1, 4) * m.scale).reshape(len(x), -1), scale=_parameter(4)),
        SEQUENCE,
        {"scale"},
    ),
    "parameter on transposed activations": (
        lambda: LayersOf(lambda m, x: (x.transpose(0, 1) * m.scale).transpose(0, 1), scale=_parameter(4)),
        SEQUENCE,
        {"scale"},
    ),
    "parameter on as many positions as samples": (
        lambda: LayersOf(lambda m, x: (x[:, :4].transpose(0, 1) * m.scale).transpose(0, 1), scale=_parameter(4)),
        SEQUENCE,
        {"scale"},
    ),
}

LOOP: dict[str, tuple[Callable[[], nn.Module], Tensor, set[str]]] = {
    "branch on a value": (lambda: LayersOf(_branch, a=nn.Linear(3, 4), scale=_parameter(4)), FLAT, {"scale"}),
    **{
        kind.__name__: (
            lambda kind=kind: LayersOf(
                lambda m, x: m.head(m.rnn(x)[0]), rnn=kind(4, 3, batch_first=True), head=nn.Linear(3, 2)
            ),
            SEQUENCE,
            {f"rnn.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
        )
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    },
}


def _plan(module: nn.Module, x: Tensor) -> GradientPlan:
    return plan_gradients(module, module, lambda p, x: functional_call(module, dict(p), x), x, len(x))


def _follow(module: nn.Module, plan: GradientPlan, x: Tensor) -> dict[str, Tensor]:
    found = {name: torch.zeros(len(x), *module.get_parameter(name).shape).to(x) for name in plan.hooked}

    def add(gradients: Mapping[str, ParameterGradient]) -> None:
        for name, gradient in gradients.items():
            found[name] = found[name] + materialise(gradient, tuple(module.get_parameter(name).shape))

    HookedGradients(module, plan.hooked, plan.direct)(lambda: module(x), len(x), add)
    if plan.fallback:
        per_sample = vmap_gradients if plan.vectorised else loop_gradients
        params = {name: module.get_parameter(name) for name in plan.fallback}
        found |= per_sample(lambda p, x: functional_call(module, dict(p), x), params, x, len(x))
    return found


def _check(make: Callable[[], nn.Module], x: Tensor) -> GradientPlan:
    module = make().double().eval()
    plan = _plan(module, x)
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert {*plan.hooked, *plan.fallback} == trainable.keys()
    for batch in (x, x.repeat(2, *[1] * (x.ndim - 1))[1:], x[:1]):  # other batch sizes than the plan's, too
        found = _follow(module, plan, batch)
        with plain_execution():  # torch.autograd.grad refuses reentrant checkpoints
            rows = [
                torch.autograd.grad(module(batch[i : i + 1])[0], list(trainable.values()), materialize_grads=True)
                for i in range(len(batch))
            ]
        for name, column in zip(trainable, zip(*rows, strict=True), strict=True):
            torch.testing.assert_close(found[name], torch.stack(column), rtol=1e-9, atol=1e-11)
    return plan


@pytest.mark.parametrize("case", HOOKED)
def test_layers_with_a_rule_are_hooked(case: str) -> None:
    plan = _check(*HOOKED[case])
    assert plan.fallback == ()


@pytest.mark.parametrize("case", FALLBACK)
def test_what_no_rule_covers_goes_through_vmap(case: str) -> None:
    make, x, names = FALLBACK[case]
    plan = _check(make, x)
    assert set(plan.fallback) == names
    assert plan.vectorised


@pytest.mark.parametrize("case", LOOP)
def test_what_vmap_cannot_trace_goes_through_the_loop(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, x, names = LOOP[case]
    with caplog.at_level(logging.INFO, "lightning_attr"):
        plan = _check(make, x)
    assert set(plan.fallback) == names
    assert not plan.vectorised
    assert "falling back to a loop over samples" in caplog.text
    assert "a loop over samples, which is slower" in caplog.text


def test_the_log_names_the_fallback_and_its_share(caplog: pytest.LogCaptureFixture) -> None:
    module = LayersOf(
        lambda m, x: _Product.apply(m.a(x), m.scale), a=nn.Linear(3, 2), scale=nn.Parameter(torch.ones(2))
    ).double()
    with caplog.at_level(logging.WARNING, "lightning_attr"):
        _plan(module, FLAT)
    assert caplog.messages == [
        "LayersOf: `scale` (20.0% of the trainable parameters) go through vmap(grad), which is slower: `scale` belong "
        "to no layer with a gradient rule."
    ]


def test_the_log_cuts_a_long_list(caplog: pytest.LogCaptureFixture) -> None:
    names = "abcdef"
    scales = {name: nn.Parameter(torch.ones(3)) for name in names}
    module = LayersOf(lambda m, x: _Product.apply(x, sum(getattr(m, name) for name in names)), **scales).double()
    _plan(module, FLAT)
    assert "`a`, `b`, `c`, `d` and 2 more parameters (100.0% of" in caplog.text


def test_nothing_is_logged_without_fallback(caplog: pytest.LogCaptureFixture) -> None:
    _plan(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double(), FLAT)
    assert caplog.messages == []


def test_one_sample_is_enough_for_a_plan() -> None:
    module = LayersOf(lambda m, x: m.a(x), a=nn.Linear(3, 2)).double()
    assert _plan(module, FLAT[:1]).hooked == ("a.weight", "a.bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plan_in_lower_precision(dtype: torch.dtype) -> None:
    module = LayersOf(_residual, **dict(HOOKED["residual net"][0]().named_children())).to(dtype).eval()
    assert _plan(module, SEQUENCE.to(dtype)).fallback == ()


def test_gradients_that_mix_samples_are_found() -> None:
    module = LayersOf(lambda m, x: m.a(x), a=nn.Linear(3, 2)).double()

    def centred(x: Tensor) -> Tensor:
        out = module(x)
        return out + out.detach() - out.mean()  # equal gradients only if each sample is on its own

    with pytest.raises(
        BatchDependenceError, match=r"gradient of .* `a.weight`, `a.bias` changes with the samples beside"
    ):
        plan_gradients(module, centred, lambda p, x: functional_call(module, dict(p), x), FLAT, B)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    module = LayersOf(lambda m, x: m.a(x), a=nn.Linear(3, 2)).double()

    def rooted(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        out = F.linear(x, params["a.weight"], params["a.bias"])
        return (out * (x[:, :1] > 0)).abs().sqrt().sum(1)  # infinite slope at 0

    x = FLAT.clone()
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    with pytest.raises(NonFiniteGradientError, match=r"`a.weight`, `a.bias` is NaN or Inf .positions \[1, 3\]"):
        plan_gradients(module, lambda x: rooted(dict(module.named_parameters()), x), rooted, x, B)


def test_a_use_that_the_rule_cannot_see_counts_even_while_its_gradient_is_zero() -> None:
    def gated(m: nn.Module, x: Tensor) -> Tensor:
        return m.a(x[:, 0]) + m.gate * m.a(x.reshape(-1, 4)).reshape(len(x), 5, -1).sum(1)  # closed at first

    module = LayersOf(gated, a=nn.Linear(4, 2), gate=nn.Parameter(torch.zeros(()))).double()
    assert set(_plan(module, SEQUENCE).fallback) == {"a.weight", "a.bias"}


def test_a_rule_that_is_wrong_is_found_and_named(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    @gradient_rule(Scaled)
    def scaled(layer: nn.Module, activations: Tensor, backprops: Tensor) -> dict[str, Tensor]:
        return {"weight": backprops[:, :, None] * activations[:, None] * 1.01, "bias": backprops}

    module = LayersOf(lambda m, x: m.a(x), a=Scaled(3, 2)).double()
    assert _plan(module, FLAT) == GradientPlan(("a.bias",), ("a.weight",), vectorised=True)
    assert caplog.messages == [
        "LayersOf: `a.weight` (75.0% of the trainable parameters) go through vmap(grad), which is slower: `a.weight` "
        "are used in ways that the rule of their layer does not see."
    ]


def test_a_gradient_that_is_only_rounding_is_no_reason_to_fall_back() -> None:
    def attend(m: nn.Module, x: Tensor) -> Tensor:
        return (m.q(x) @ m.k(x).mT).softmax(-1) @ x  # the bias of the keys cancels

    module = LayersOf(attend, q=nn.Linear(4, 4), k=nn.Linear(4, 4))
    assert _plan(module, SEQUENCE.float()).fallback == ()


def test_samples_routed_by_their_values_are_refused() -> None:
    def route(m: nn.Module, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        return torch.zeros(len(x), 2).double().masked_scatter(chosen[:, None], m.expert(x[chosen])) + m.a(x)

    module = LayersOf(route, a=nn.Linear(3, 2), expert=nn.Linear(3, 2)).double()
    plan = _plan(module, FLAT.abs())  # all samples of the check take one route
    assert "expert.weight" in plan.hooked
    x = torch.cat([FLAT.abs(), -FLAT.abs()])
    with pytest.raises(
        UnsupportedLayerError, match=r"`expert.bias`, `expert.weight` was called with other rows than the 8"
    ):
        _follow(module, plan, x)


def test_batch_independence_passes_and_leaves_no_graph() -> None:
    weight = torch.ones(3, requires_grad=True)
    check_batch_independence(lambda x: x @ weight, torch.randn(4, 3), 4)
    check_batch_independence(lambda x: x.sum(1) * 0 + x.mean(), torch.randn(1, 3), 1)  # one sample: nothing to compare


@pytest.mark.parametrize("b", [2, 3, 4])
def test_batch_dependent_outputs_are_found(b: int) -> None:
    with pytest.raises(
        BatchDependenceError, match=f"depends on the samples beside it: the same {b} samples in one batch"
    ):
        check_batch_independence(lambda x: x.sum(1) - x.mean(), torch.randn(b, 3), b)


@pytest.mark.parametrize("shape", [(), (4, 1), (3,)])
def test_outputs_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one value a sample, of shape \(4,\), but got"):
        check_batch_independence(lambda x: torch.zeros(shape), torch.randn(4, 3), 4)


def test_outputs_that_are_not_finite_are_refused() -> None:
    x = torch.tensor([1.0, 0.0, 1.0, 0.0])
    with pytest.raises(NonFiniteGradientError, match=r"NaN or Inf \(positions \[1, 3\] of the 4 samples that"):
        check_batch_independence(lambda x: 1 / x, x, 4)


def test_a_batch_that_cannot_be_split_is_refused() -> None:
    images = [torch.randn(2, size) for size in (3, 5, 4, 2)]  # one tensor per sample, in a list
    with pytest.raises(
        ValueError, match=r"Expected a part of 2 of the 4 samples to give outputs of shape \(2,\), but got"
    ):
        check_batch_independence(lambda batch: torch.stack([image.sum() for image in batch]), images, 4)
