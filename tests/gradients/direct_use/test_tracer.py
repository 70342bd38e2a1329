"""Parameters used outside layers with a rule: one pass with the hooks, and the per-sample loop's gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from cases import LayersOf
from lightning_attr.errors import UnsupportedLayerError
from lightning_attr.gradients import (
    GradientPlan,
    HookedGradients,
    OuterSum,
    ParameterGradient,
    hooked_gradients,
    loop_gradients,
    materialise,
    plan_gradients,
)
from lightning_attr.gradients.direct_use import use

B = 4
IDS = torch.tensor([[0, 1, 2], [3, 3, 4], [4, 0, 1], [2, 2, 2]])
FLAT = torch.randn(B, 3, generator=torch.Generator().manual_seed(1)).double()
SEQUENCE = torch.randn(B, 5, 6, generator=torch.Generator().manual_seed(2)).double()
IMAGES = torch.randn(B, 2, 5, 5, generator=torch.Generator().manual_seed(3)).double()


def _p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def _plan(module: nn.Module, x: Tensor) -> GradientPlan:
    return plan_gradients(module, module, lambda p, x: functional_call(module, dict(p), x), x, len(x))


def _gradients(module: nn.Module, x: Tensor, plan: GradientPlan) -> dict[str, Tensor]:
    found = {name: torch.zeros(len(x), *module.get_parameter(name).shape, dtype=x.dtype) for name in plan.hooked}

    def add(gradients: Mapping[str, ParameterGradient]) -> None:
        for name, gradient in gradients.items():
            found[name] = found[name] + materialise(gradient, tuple(module.get_parameter(name).shape))

    HookedGradients(module, plan.hooked, plan.direct)(lambda: module(x), len(x), add)
    return found


def _check(module: nn.Module, x: Tensor) -> GradientPlan:
    module = module.double().eval()
    plan = _plan(module, x)
    several = x.repeat(3, *[1] * (x.ndim - 1))
    for batch in (x, several[1:9], *(several[:size] for size in (1, 2, 3, 5, 6, 7))):  # of sizes that other things have
        expected = loop_gradients(
            lambda p, x: functional_call(module, dict(p), x),
            {name: p for name, p in module.named_parameters() if name in plan.hooked},
            batch,
            len(batch),
        )
        found = _gradients(module, batch, plan)
        for name, rows in expected.items():
            message = f"{name}, a batch of {len(batch)}: {{}}".format
            torch.testing.assert_close(found[name].to(rows), rows, rtol=1e-10, atol=1e-12, msg=message)
    return plan


def _vision(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.cat([m.cls.expand(x.shape[0], -1, -1), m.first(x)], dim=1)
    return m.last((h + m.pos[:, : h.shape[1]]).tanh())


def _rms(m: nn.Module, x: Tensor) -> Tensor:
    h = m.first(x).float()
    return m.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _merged(m: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, m.base.weight + 2 * m.b @ m.a, m.base.bias)


def _relative(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in m.qkv(x).chunk(3, dim=-1))
    s = torch.arange(x.shape[1])
    bias = m.table[(s[:, None] - s[None, :]).clamp(-3, 3) + 3].permute(2, 0, 1).unsqueeze(0)
    if m.fused:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        mask = (x[..., 0] > 1.5).to(x.dtype)[:, None, None] * -10
        out = (q @ k.mT + (bias + mask)).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


def _bucketed(m: nn.Module, x: Tensor) -> Tensor:
    s = torch.arange(x.shape[1])
    bias = m.table((s[:, None] - s[None, :]).clamp(-3, 3) + 3).permute(2, 0, 1).unsqueeze(0)
    scores = m.first(x)[:, None] @ x[:, None].mT + bias
    return scores.softmax(-1) @ x[:, None]


def _contiguous_bias(m: nn.Module, x: Tensor) -> Tensor:
    s = torch.arange(x.shape[1])
    bias = m.table((s[:, None] - s[None, :]).clamp(-3, 3) + 3).permute(2, 0, 1).unsqueeze(0)
    scores = m.first(x)[:, None] @ x[:, None].mT
    once, twice = (scores + bias.contiguous()).softmax(-1), (scores.tanh() + bias.contiguous()).softmax(-1)
    bias.mul_(2)
    return torch.cat([once, twice, (scores + bias.contiguous()).softmax(-1)], dim=1) @ x[:, None]


def _shared_bias(m: nn.Module, x: Tensor) -> Tensor:
    s = torch.arange(x.shape[1])
    bias = m.table((s[:, None] - s[None, :]).clamp(-3, 3) + 3).permute(2, 0, 1).unsqueeze(0)
    scores = m.first(x)[:, None] @ x[:, None].mT
    _ = scores * bias  # no part in the output
    once = (scores + bias).softmax(-1) @ x[:, None]
    return (once @ once.mT + bias).softmax(-1) @ once


def _in_place(m: nn.Module, x: Tensor) -> Tensor:
    h = m.first(x)
    h *= m.scale
    h += m.shift
    h[:, 0] = m.token
    h.mul_(m.scale.exp())
    return m.last(h)


def _queries(m: nn.Module, x: Tensor) -> Tensor:
    q = m.project(m.queries.expand(len(x), -1, -1))
    return (q @ m.first(x).mT).softmax(-1) @ x


def _repeated(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.stack([m.a.repeat(len(x), 1), m.b.unsqueeze(0).expand_as(x), x, m.c.broadcast_to(x.shape)], dim=1)
    return h.flatten(1) @ m.w


def _with_fused(module: nn.Module, fused: bool) -> nn.Module:
    module.fused = fused
    return module


def _tied(run: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    return LayersOf(run, table=nn.Embedding(5, 6), first=nn.Linear(6, 6))


def _normalised(kind: str) -> tuple[nn.Module, Tensor]:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.first(x)
        if kind == "layer":
            return F.layer_norm(h, (6,), m.w, m.b)
        if kind == "rms":
            return F.rms_norm(h, (6,), weight=m.w)
        h = h.transpose(1, 2)
        if kind == "group":
            return F.group_norm(h, 2, weight=m.w, bias=m.b)
        if kind == "instance":
            return F.instance_norm(h, weight=m.w, bias=m.b)
        return F.batch_norm(h, m.mean, m.mean.exp(), m.w, m.b)

    module = LayersOf(run, first=nn.Linear(6, 6), w=_p(6), **({} if kind == "rms" else {"b": _p(6)}))
    module.register_buffer("mean", torch.linspace(-1, 1, 6))
    return module, SEQUENCE


def _filled(x: Tensor, by_view: bool = False) -> Tensor:
    h = torch.zeros(len(x), 4, dtype=x.dtype)
    if by_view:
        h[:, 1:].copy_(x)
    else:
        h[:, :3] = x
    return h


def _with_table(module: nn.Module, rows: int) -> nn.Module:
    module.register_buffer("constant", torch.linspace(-1, 1, 3 * rows).reshape(rows, 3))
    return module


parametrized = nn.utils.parametrizations

COVERED: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "scale and shift": lambda: (
        LayersOf(lambda m, x: m.first(x) * m.scale + m.shift, first=nn.Linear(3, 3), scale=_p(3), shift=_p(3)),
        FLAT,
    ),
    "without layers": lambda: (LayersOf(lambda m, x: (x * m.scale + m.shift).tanh(), scale=_p(3), shift=_p(3)), FLAT),
    "reflected": lambda: (
        LayersOf(lambda m, x: 1 - m.a - x + (m.b - x) * (2 / m.c / (2 + x.sin())), a=_p(3), b=_p(1), c=_p(3)),
        FLAT,
    ),
    "scalar": lambda: (LayersOf(lambda m, x: m.first(x) / m.t.exp() + m.t, first=nn.Linear(3, 2), t=_p()), FLAT),
    "computed from the parameter": lambda: (
        LayersOf(lambda m, x: x * F.softplus(m.scale) + m.mix.softmax(0)[1], scale=_p(3), mix=_p(4)),
        FLAT,
    ),
    "other functions": lambda: (
        LayersOf(
            lambda m, x: (
                torch.where(x > 0, m.a, torch.maximum(x, m.b)).addcmul(x, m.a).lerp(m.b, 0.3)
                * torch.addcmul(m.b, x, m.a)
            ),
            a=_p(3),
            b=_p(3),
        ),
        FLAT,
    ),
    "masked tokens": lambda: (
        LayersOf(lambda m, x: torch.where(x[..., :1] > 0, m.mask, x) * m.mask.sum(), mask=_p(1, 1, 6)),
        SEQUENCE,
    ),
    "class token and positions": lambda: (
        LayersOf(_vision, first=nn.Linear(6, 4), cls=_p(1, 1, 4), pos=_p(1, 9, 4), last=nn.Linear(4, 2)),
        SEQUENCE,
    ),
    "positions as a table": lambda: (
        LayersOf(lambda m, x: m.last(x + m.pos[: x.shape[1]]), pos=_p(9, 6), last=nn.Linear(6, 2)),
        SEQUENCE,
    ),
    "layer scale": lambda: (
        LayersOf(lambda m, x: x + m.gamma[:, None, None] * m.conv(x), conv=nn.Conv2d(2, 2, 1), gamma=_p(2)),
        IMAGES,
    ),
    "norm of its own": lambda: (LayersOf(_rms, first=nn.Linear(6, 4), weight=_p(4)), SEQUENCE),
    "adapter": lambda: (
        LayersOf(
            lambda m, x: m.base(x) + x @ m.a @ m.b + x @ m.c.T,
            base=nn.Linear(6, 4).requires_grad_(False),
            a=_p(6, 2),
            b=_p(2, 4),
            c=_p(4, 6),
        ),
        SEQUENCE,
    ),
    "merged adapter": lambda: (LayersOf(_merged, base=nn.Linear(6, 4), a=_p(2, 6), b=_p(4, 2)), SEQUENCE),
    "linear function": lambda: (LayersOf(lambda m, x: F.linear(x, m.w, m.b), w=_p(2, 6), b=_p(2)), SEQUENCE),
    "linear function, weights by keyword": lambda: (
        LayersOf(lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), w=_p(2, 3), b=_p(2)),
        FLAT,
    ),
    "matrix from the left": lambda: (LayersOf(lambda m, x: (m.w @ x).mT @ m.v, w=_p(3, 5), v=_p(3)), SEQUENCE),
    "matrix for each head": lambda: (
        LayersOf(lambda m, x: x.unsqueeze(1) @ m.w + m.v @ x.unsqueeze(1) @ m.w, w=_p(3, 6, 2), v=_p(3, 5, 5)),
        SEQUENCE,
    ),
    "addmm": lambda: (LayersOf(lambda m, x: torch.addmm(m.b, x, m.w), w=_p(3, 2), b=_p(2)), FLAT),
    "einsum": lambda: (
        LayersOf(
            lambda m, x: torch.einsum("bsd,hdk->bhsk", x, m.w) * torch.einsum("d,bsd->bs", m.v, x)[:, None, :, None],
            w=_p(2, 6, 3),
            v=_p(6),
        ),
        SEQUENCE,
    ),
    "embedding function": lambda: (
        LayersOf(
            lambda m, x: F.embedding(x, m.table) + F.embedding(x, m.other, padding_idx=-1),
            table=_p(5, 3),
            other=_p(5, 3),
        ),
        IDS,
    ),
    "index by ids": lambda: (
        LayersOf(
            lambda m, x: (
                m.table[x] * m.bias[x][..., None]
                + m.cube[x - 2].sum(-1)
                + torch.index_select(m.table, 0, x[:, 0])[:, None]
            ),
            table=_p(5, 3),
            bias=_p(5),
            cube=_p(5, 3, 2),
        ),
        IDS,
    ),
    "positions shared by the batch": lambda: (
        LayersOf(lambda m, x: m.a(x) + m.b(torch.arange(x.shape[1])), a=nn.Embedding(5, 4), b=nn.Embedding(8, 4)),
        IDS,
    ),
    "network of positions": lambda: (
        LayersOf(
            lambda m, x: x + m.b(m.a(torch.linspace(0, 1, 5).double()[:, None]).tanh()),
            a=nn.Linear(1, 3),
            b=nn.Linear(3, 6),
        ),
        SEQUENCE,
    ),
    "token types shared by the batch": lambda: (
        LayersOf(
            lambda m, x: m.a(x) * m.scale + m.b(torch.zeros(x.shape, dtype=torch.long)),
            a=nn.Embedding(5, 4),
            b=nn.Embedding(2, 4),
            scale=_p(4),
        ),
        IDS,
    ),
    **{
        f"convolution {dims}d": lambda dims=dims, conv=conv: (
            LayersOf(
                lambda m, x: conv(x, m.w * m.g, m.b, stride=2, padding=1), w=_p(4, 2, *[3] * dims), b=_p(4), g=_p()
            ),
            IMAGES.flatten(2) if dims == 1 else IMAGES if dims == 2 else IMAGES[..., None].expand(-1, -1, -1, -1, 2),
        )
        for dims, conv in {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}.items()
    },
    "convolution with groups": lambda: (
        LayersOf(lambda m, x: F.conv2d(x, m.w, None, 1, "same", 2, 2), w=_p(4, 1, 3, 3)),
        IMAGES,
    ),
    "transposed convolution": lambda: (
        LayersOf(lambda m, x: F.conv_transpose2d(x, m.w, m.b, stride=2, padding=1), w=_p(2, 3, 3, 3), b=_p(3)),
        IMAGES,
    ),
    "prelu": lambda: (LayersOf(lambda m, x: F.prelu(x, m.slope), slope=_p(2)), IMAGES),
    **{f"{kind} norm": lambda kind=kind: _normalised(kind) for kind in ("layer", "rms", "group", "instance", "batch")},
    "weight norm": lambda: (nn.Sequential(parametrized.weight_norm(nn.Linear(3, 2)), LayersOf(lambda m, x: x)), FLAT),
    "weight norm of a convolution": lambda: (
        LayersOf(lambda m, x: m.conv(x), conv=parametrized.weight_norm(nn.Conv2d(2, 3, 3), dim=None)),
        IMAGES,
    ),
    "spectral norm": lambda: (LayersOf(lambda m, x: m.a(x), a=parametrized.spectral_norm(nn.Linear(6, 6))), SEQUENCE),
    "orthogonal": lambda: (
        LayersOf(lambda m, x: m.a(x), a=parametrized.orthogonal(nn.Linear(6, 6), orthogonal_map="cayley")),
        SEQUENCE,
    ),
    "relative positions added": lambda: (
        _with_fused(LayersOf(_relative, qkv=nn.Linear(6, 24), table=_p(7, 2)), False),
        SEQUENCE,
    ),
    "relative positions as a mask": lambda: (
        _with_fused(LayersOf(_relative, qkv=nn.Linear(6, 24), table=_p(7, 2)), True),
        SEQUENCE,
    ),
    "relative positions of an embedding": lambda: (
        LayersOf(_bucketed, first=nn.Linear(6, 6), table=nn.Embedding(7, 2)),
        SEQUENCE,
    ),
    "one bias of two layers": lambda: (
        LayersOf(_shared_bias, first=nn.Linear(6, 6), table=nn.Embedding(7, 2)),
        SEQUENCE,
    ),
    "one bias of two layers, each of which makes it contiguous": lambda: (
        LayersOf(_contiguous_bias, first=nn.Linear(6, 6), table=nn.Embedding(7, 2)),
        SEQUENCE,
    ),
    "in place": lambda: (
        LayersOf(_in_place, first=nn.Linear(6, 4), scale=_p(4), shift=_p(4), token=_p(4), last=nn.Linear(4, 2)),
        SEQUENCE,
    ),
    "queries": lambda: (
        LayersOf(_queries, queries=_p(1, 3, 6), project=nn.Linear(6, 6), first=nn.Linear(6, 6)),
        SEQUENCE,
    ),
    "queries of attention": lambda: (
        LayersOf(
            lambda m, x: m.attention(m.queries.repeat(len(x), 1, 1), x, x)[0],
            queries=_p(1, 3, 6),
            attention=nn.MultiheadAttention(6, 2, batch_first=True),
        ),
        SEQUENCE,
    ),
    "repeated": lambda: (LayersOf(_repeated, a=_p(1, 3), b=_p(3), c=_p(3), w=_p(12, 2)), FLAT),
    "tied head": lambda: (_tied(lambda m, x: F.linear(m.first(m.table(x)), m.table.weight)), IDS),
    "tied head, transposed": lambda: (
        _tied(lambda m, x: m.first(m.table(x)) @ m.table.weight.t() + m.table.weight[0, 0]),
        IDS,
    ),
    "layer used directly, too": lambda: (
        LayersOf(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight) + m.a.bias, a=nn.Linear(3, 3)),
        FLAT,
    ),
    **{
        f"constant table of {rows} rows": lambda rows=rows: (
            _with_table(
                LayersOf(lambda m, x: x @ (m.constant * m.scale).T + (m.constant @ m.v), scale=_p(3), v=_p(3)), rows
            ),
            FLAT,
        )
        for rows in (B, 8)
    },
    "a value that no sample has a part in": lambda: (
        LayersOf(
            lambda m, x: m.a(x) + m.b.square().sum() + torch.zeros(3).fill_(2).to(x) @ m.b,
            a=nn.Linear(3, 2),
            b=_p(3),
        ),
        FLAT,
    ),
    "new tensor filled from the batch": lambda: (
        LayersOf(lambda m, x: _filled(x) * m.scale + _filled(x, by_view=True) @ m.w, scale=_p(4), w=_p(4, 4)),
        FLAT,
    ),
    "never used": lambda: (LayersOf(lambda m, x: m.a(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2), c=_p(3)), FLAT),
    **{
        f"checkpoint, reentrant {reentrant}": lambda reentrant=reentrant: (
            LayersOf(
                lambda m, x: m.b(
                    checkpoint(
                        lambda h: m.a(h * m.v.exp()).tanh() * m.scale + F.softplus(m.v), x, use_reentrant=reentrant
                    )
                ),
                a=nn.Linear(3, 3),
                b=nn.Linear(3, 2),
                scale=_p(3),
                v=_p(3),
            ),
            FLAT,
        )
        for reentrant in (True, False)
    },
    "compiled": lambda: (
        torch.compile(LayersOf(lambda m, x: m.a(x) * m.scale, a=nn.Linear(3, 2), scale=_p(2)), backend="eager"),
        FLAT,
    ),
}


@pytest.mark.parametrize("case", COVERED)
def test_one_pass_covers(case: str, caplog: pytest.LogCaptureFixture) -> None:
    module, x = COVERED[case]()
    assert _check(module, x).fallback == ()
    assert caplog.messages == []


def test_a_parameter_that_comes_into_use_later_is_seen() -> None:
    module = LayersOf(
        lambda m, x: m.a(x) + (m.b.weight[:, 0] * m.c if (x > 9).any() else 0),
        a=nn.Linear(3, 2),
        b=nn.Linear(3, 2),
        c=_p(2),
    ).double()
    plan = _plan(module, FLAT)
    assert plan.fallback == ()
    assert plan.direct == ("b.weight", "b.bias")
    x = FLAT + 10
    params = {"b.weight": module.b.weight, "c": module.c}
    expected = loop_gradients(lambda p, x: functional_call(module, dict(p), x), params, x, B)
    found = _gradients(module, x, plan)
    assert all(expected[name].any() for name in params)
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-10, atol=1e-12)


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, (gradient * ctx.saved_tensors[0]).sum(0)


@pytest.mark.parametrize("use", [lambda m, x: _Hidden.apply(x, m.b.exp()), lambda m, x: torch.cdist(x, m.b[None])])
def test_a_later_use_that_shows_no_samples_is_refused(use: Callable[[nn.Module, Tensor], Tensor]) -> None:
    module = LayersOf(
        lambda m, x: m.a(x).sum(1, keepdim=True) + (use(m, x) if (x > 9).any() else x * m.b), a=nn.Linear(3, 2), b=_p(3)
    ).double()
    plan = _plan(module, FLAT)
    assert plan.fallback == ()
    with pytest.raises(
        UnsupportedLayerError, match=r"`b` was called with other rows than the 4 samples .* or the parameter"
    ):
        _gradients(module, FLAT + 10, plan)


@pytest.mark.parametrize("case", ["tied head", "class token and positions", "merged adapter"])
def test_without_a_plan_everything_is_followed(case: str) -> None:
    module, x = COVERED[case]()
    module = module.double()
    plan = _plan(module, x)
    expected, found = _gradients(module, x, plan), {name: torch.zeros(()) for name in plan.hooked}

    def add(name: str, gradient: ParameterGradient) -> None:
        found[name] = found[name] + materialise(gradient, tuple(module.get_parameter(name).shape))

    hooked_gradients(module, lambda: module(x), len(x), plan.hooked, add)
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-10, atol=1e-12)


def test_layers_with_rules_alone_run_without_the_mode() -> None:
    modes: list[int] = []

    def run(m: nn.Module, x: Tensor) -> Tensor:
        modes.append(len(torch.overrides._get_current_function_mode_stack()))
        return m.a(x)

    module = LayersOf(run, a=nn.Linear(3, 2)).double()
    plan = _plan(module, FLAT)
    modes.clear()
    _gradients(module, FLAT, plan)
    assert modes == [0]


def test_only_what_is_asked_for_comes_and_nothing_is_left_behind() -> None:
    module, x = COVERED["scale and shift"]()
    module = module.double()
    seen: list[str] = []
    for _ in range(2):
        hooked_gradients(module, lambda: module(x), B, ["scale"], lambda name, gradient: seen.append(name))
    assert seen == ["scale", "scale"]
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("layers", [1, 3])
def test_a_bias_that_layers_make_contiguous_comes_once(layers: int) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        bias = m.table.mT
        for _ in range(layers):
            x = (x + bias.contiguous()).tanh()
        return x

    module = LayersOf(forward, table=_p(6, 5)).double()
    found: list[Tensor] = []
    hooked_gradients(module, lambda: module(SEQUENCE), B, ["table"], lambda _, g: found.append(materialise(g, (6, 5))))
    expected = loop_gradients(
        lambda p, x: functional_call(module, dict(p), x), dict(module.named_parameters()), SEQUENCE, B
    )
    (gradient,) = found
    torch.testing.assert_close(gradient, expected["table"], rtol=1e-10, atol=1e-12)


def test_factors_stay_factors() -> None:
    module, x = COVERED["linear function"]()
    kinds: dict[str, type] = {}
    module = module.double()
    hooked_gradients(module, lambda: module(x), B, ["w"], lambda name, gradient: kinds.update({name: type(gradient)}))
    assert kinds == {"w": OuterSum}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["scale and shift", "linear function", "class token and positions", "merged adapter"])
def test_half_precision(case: str, dtype: torch.dtype) -> None:
    module, x = COVERED[case]()
    module = module.to(dtype)
    with torch.autocast("cpu", dtype):
        found = _gradients(module, x.to(dtype), _plan(module, x.to(dtype)))
    double = module.double()
    expected = loop_gradients(
        lambda p, x: functional_call(double, dict(p), x), dict(double.named_parameters()), x.to(dtype).double(), B
    )
    assert found.keys() == {name for name, p in double.named_parameters() if p.requires_grad}
    for name, rows in found.items():
        assert (rows - expected[name]).norm() < 0.05 * expected[name].norm(), name


class Attend(nn.Module):
    def __init__(self, sizes: tuple[int, int, int], **settings: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x[..., :size] for size in self.sizes)
        return self.attention(q, k, v)[0]


def _autocast_layers() -> dict[str, tuple[nn.Module, Tensor]]:
    image = torch.randn(B, 2, 5, 5)
    return {
        "linear": (nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)), FLAT.float()),
        "convolution": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(True), nn.Conv2d(4, 3, 2, groups=1)), image),
        "channels last": (
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(True), nn.Conv2d(4, 4, 2, groups=2)).to(
                memory_format=torch.channels_last
            ),
            image.to(memory_format=torch.channels_last),
        ),
        "embedding and norm": (nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)), IDS),
        "attention": (Attend((6, 6, 6)), SEQUENCE.float()),
        "attention, separate projections": (Attend((6, 4, 3), kdim=4, vdim=3), SEQUENCE.float()),
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", _autocast_layers())
def test_layers_under_autocast(case: str, dtype: torch.dtype | None) -> None:
    layers, x = _autocast_layers()[case]
    module = LayersOf(lambda m, x: m.layers(x).to(torch.float32), layers=layers)
    plan = _plan(module, x)
    assert plan.fallback == ()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        found = _gradients(module, x.float() if x.is_floating_point() else x, plan)
        loop = loop_gradients(lambda p, x: functional_call(module, dict(p), x), dict(module.named_parameters()), x, B)
    tolerance = {None: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.01}[dtype]
    total = sum(rows.norm() ** 2 for rows in loop.values()).sqrt()
    for name, rows in found.items():
        assert rows.dtype == torch.float32
        assert (rows - loop[name]).norm() < tolerance * (loop[name].norm() + 0.01 * total), name


def test_a_handler_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """``addmv`` has no handler: registered, its parameter has its gradients in the pass of the hooks."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = _p(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmv(x.new_zeros(len(x)), x, self.weight)

    assert not _plan(Module().double(), FLAT).hooked
    monkeypatch.setattr(use, "HANDLERS", dict(use.HANDLERS))

    @use.handles("addmv")
    def addmv(call: use.Use) -> Any:
        zero, x, value = call.args
        if not call.is_batch(x) or not call.is_derived(value) or zero.any():
            return NotImplemented
        copy = call.mode.copy(value, 2)
        return NotImplemented if copy is None else (x * copy).sum(-1)

    assert set(_check(Module(), FLAT).hooked) == {"weight"}
