"""The networks have the published sizes, and can be attributed by the rules of their layers alone."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from classifier import Classifier
from logistic_regression import LogisticRegression
from midi import PAD
from mlp import MLP
from music_transformer import MusicTransformer, RelativeAttention, sinusoids, skew
from nanogpt import CausalAttention, MeanTokenMargin, NanoGPT, warm_cosine
from resnet9 import BasicBlockResNet9, FastResNet9, triangle
from settings import SETTINGS
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector
from lightning_attr.testing import check_model_output


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("mnist-lr", 7850),  # 784 x 10 and 10; dattri's poster prints 7,840, without the bias
        ("mnist-mlp", 109_386),  # dattri (Deng et al., 2024): 0.11M
        ("cifar2-dattri", 4_825_154),  # dattri: 4.83M
        ("cifar10-dattri", 4_825_154 + 8 * 513),
        ("cifar2-trak", 2_273_856),  # TRAK's quick start
        ("cifar10-trak", 2_273_856 + 8 * 128),
    ],
)
def test_image_models_have_the_published_number_of_parameters(setting: str, expected: int) -> None:
    assert size(SETTINGS[setting].recipe.module()) == expected


def test_nanogpt_has_the_number_of_parameters_that_karpathys_prints() -> None:
    """It prints 10.65M, without the table of positions; dattri counts 10.7M."""
    module = SETTINGS["shakespeare"].recipe.module()
    assert size(module) - module.positions.weight.numel() == 10_646_784
    assert size(module) == 10_745_088
    assert module.head.weight is module.tokens.weight


def test_the_music_transformer_has_the_parameters_of_the_released_layers() -> None:
    """By hand from their shapes; dattri prints 13.3M, which its code with 256 events does not have."""
    d, hidden, events = 512, 1024, 390
    attention = 3 * (d * d + d) + (d * d + d) + 256 * (d // 8)
    block = attention + (d * hidden + hidden) + (hidden * d + d) + 2 * 2 * d
    expected = events * d + 6 * block + 2 * d + (d * events + events)
    module = SETTINGS["maestro"].recipe.module()
    assert size(module) == expected == 13_115_782
    assert abs(expected / 13.3e6 - 1) < 0.015


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("mnist-lr", set()),
        ("mnist-mlp", {0.1}),
        ("cifar2-dattri", set()),
        ("cifar2-trak", set()),
        ("maestro", {0.1}),
        ("shakespeare", {0.2}),
    ],
)
def test_dropout_is_that_of_the_recipe(setting: str, expected: set[float]) -> None:
    module = SETTINGS[setting].recipe.module()
    assert {layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)} == expected


TINY = {
    "logistic regression": LogisticRegression,
    "mlp": MLP,
    "basic blocks": partial(BasicBlockResNet9, 3, width=4),
    "fast": partial(FastResNet9, 3, width=4),
    "nanogpt": partial(NanoGPT, 11, block=12, layers=2, heads=2, width=8),
    "music transformer": partial(MusicTransformer, length=12, layers=2, heads=2, width=8, hidden=12),
}


def batch_for(name: str, n: int = 4) -> tuple[Tensor, Tensor]:
    if name in {"logistic regression", "mlp"}:
        return torch.randn(n, 1, 28, 28, dtype=torch.float64), torch.randint(10, (n,))
    if name in {"basic blocks", "fast"}:
        return torch.randn(n, 3, 32, 32, dtype=torch.float64), torch.randint(3, (n,))
    tokens = torch.randint(11 if name == "nanogpt" else 388, (n, 13))
    return tokens[:, :-1], tokens[:, 1:]


def tiny(name: str) -> Any:
    """In float64, in eval mode, with running statistics of BatchNorm that are not those of the start."""
    module = TINY[name]().double().eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize("name", TINY)
def test_every_gradient_comes_from_a_rule_and_equals_autograd_sample_by_sample(name: str) -> None:
    module, batch = tiny(name), batch_for(name)
    chosen = plan(module, batch, 4)
    assert chosen.fallback == ()
    assert len(chosen.hooked) == len(list(module.parameters()))
    projection = IdentityProjector().bind(ParameterLayout.of(module), "final")
    features = Featurizer(module, chosen, projection)(batch, range(4))["features"]
    for row in range(4):
        alone = tuple(part[row : row + 1] for part in batch)
        f = module.model_output.output(*module.attribution_step(alone)).sum()
        gradients = torch.autograd.grad(f, list(module.parameters()))
        expected = torch.cat([gradient.flatten() for gradient in gradients])
        torch.testing.assert_close(features[row], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", TINY)
def test_the_training_loss_is_the_mean_over_samples(name: str) -> None:
    """For the Music Transformer over all events, of which only the last is attributed."""
    module, batch = tiny(name), batch_for(name)
    together = module.training_step(batch, 0)
    alone = torch.stack([module.training_step(tuple(part[k : k + 1] for part in batch), 0) for k in range(4)])
    torch.testing.assert_close(together, alone.mean())
    if name != "music transformer":
        torch.testing.assert_close(module.model_output.loss(*module.attribution_step(batch)), alone)


@pytest.mark.parametrize("name", ["nanogpt", "music transformer"])
def test_no_position_sees_what_follows(name: str) -> None:
    module, (tokens, _) = tiny(name), batch_for(name)
    before = module(tokens)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 11
    after = module(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert (after[:, 7:] - before[:, 7:]).abs().amax(2).min() > 1e-6
    torch.testing.assert_close(module(tokens[:, :5]), before[:, :5])


def test_the_last_event_of_a_piece_is_attributed() -> None:
    module, (events, following) = tiny("music transformer"), batch_for("music transformer")
    outputs, targets = module.attribution_step((events, following))
    assert torch.equal(targets, following[:, -1])
    logits = module(events)[:, -1]
    others = logits.scatter(1, targets[:, None], -torch.inf).logsumexp(1)
    expected = logits.gather(1, targets[:, None])[:, 0] - others
    torch.testing.assert_close(module.model_output.output(outputs, targets), expected)


def test_padding_is_left_out_of_the_music_transformers_training_loss() -> None:
    module, (events, following) = tiny("music transformer"), batch_for("music transformer")
    padded = following.clone()
    padded[:, 9:] = PAD
    expected = F.cross_entropy(module(events)[:, :9].flatten(0, 1), following[:, :9].flatten())
    torch.testing.assert_close(module.training_step((events, padded), 0), expected)


def naive_relative_attention(layer: RelativeAttention, x: Tensor) -> Tensor:
    """One dot product after the other."""
    (b, length, width), heads = x.shape, layer.heads
    per_head = width // heads
    q, k, v = (part.view(b, length, heads, per_head) for part in layer.qkv(x).split(width, dim=2))
    out = torch.zeros_like(q)
    for n in range(b):
        for h in range(heads):
            for i in range(length):
                logits = []
                for j in range(i + 1):
                    row = layer.distances.weight[layer.length - 1 - (i - j)]
                    logits.append(q[n, i, h] @ (k[n, j, h] + row) / math.sqrt(per_head))
                weights = torch.stack(logits).softmax(0)
                out[n, i, h] = sum(w * v[n, j, h] for j, w in enumerate(weights))
    return layer.out(out.flatten(2))


@pytest.mark.parametrize("length", [1, 6, 9])
def test_relative_attention_is_that_of_all_pairs(length: int) -> None:
    layer = RelativeAttention(9, heads=2, width=8, dropout=0.1).double().eval()
    x = torch.randn(2, length, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive_relative_attention(layer, x))


def test_skewing_moves_distances_to_positions() -> None:
    products = torch.arange(12.0).view(1, 1, 3, 4)[..., 1:]  # row i: 4 i + 1, 4 i + 2, 4 i + 3
    skewed = skew(products)[0, 0]
    assert skewed.tril().tolist() == [[3, 0, 0], [6, 7, 0], [9, 10, 11]]


def test_sinusoids_are_sines_and_cosines_of_falling_frequencies() -> None:
    table = sinusoids(5, 6)
    for position in range(5):
        for k in range(3):
            angle = position / 10_000 ** (2 * k / 6)
            assert table[position, 2 * k] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * k + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_causal_attention_is_a_masked_softmax() -> None:
    layer = CausalAttention(8, heads=2, dropout=0.2).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    q, k, v = (part.view(2, 5, 2, 4).transpose(1, 2) for part in layer.qkv(x).split(8, dim=2))
    logits = (q @ k.transpose(2, 3) / 2).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    expected = layer.out((logits.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 8))
    torch.testing.assert_close(layer(x), expected)


def test_mean_token_margin_is_the_log_odds_of_the_mean_probability() -> None:
    logits, tokens = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(7, (3, 5))
    check_model_output(MeanTokenMargin(), logits, tokens)
    p = logits.softmax(2).gather(2, tokens.unsqueeze(2)).squeeze(2).prod(1) ** (1 / 5)
    torch.testing.assert_close(MeanTokenMargin().output(logits, tokens), torch.logit(p))
    torch.testing.assert_close(MeanTokenMargin().out_to_loss(logits, tokens), 1 - p)
    fitted = 30 * F.one_hot(tokens, 7).float()  # in float32, 1 - p is far below its resolution
    expected = torch.full((3,), 30 - math.log(6))
    torch.testing.assert_close(MeanTokenMargin().output(fitted, tokens), expected)


def optimized(module: L.LightningModule) -> Any:
    module._trainer = SimpleNamespace(estimated_stepping_batches=240)  # type: ignore[assignment]
    return module.configure_optimizers()


def test_the_optimizers_are_those_of_the_recipes() -> None:
    for name, module in (("mnist-lr", LogisticRegression()), ("mnist-mlp", MLP()), ("cifar", tiny("basic blocks"))):
        (group,) = optimized(module).param_groups
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.0 if name == "mnist-lr" else 0.9, 0)
    fast = optimized(tiny("fast"))
    (group,) = fast["optimizer"].param_groups
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.4, 0.9, 5e-4)
    assert fast["lr_scheduler"]["interval"] == "step"
    music = optimized(tiny("music transformer"))
    (group,) = music.param_groups
    assert isinstance(music, torch.optim.Adam)
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-4, (0.9, 0.98), 1e-8, 0)
    gpt = tiny("nanogpt")
    decayed, others = optimized(gpt)["optimizer"].param_groups
    assert (decayed["initial_lr"], decayed["betas"]) == (1e-3, (0.9, 0.99))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}


def test_the_schedules_have_the_published_corners() -> None:
    assert [triangle(epoch / 24) for epoch in (0, 2.5, 5, 14.5, 24)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    steps = (0, 50, 100, 2550, 5000)
    assert [warm_cosine(step / 5000) for step in steps] == pytest.approx([0, 0.5, 1, 0.55, 0.1])


def test_a_schedule_moves_after_every_step() -> None:
    module = Classifier(nn.Linear(2, 2), 2.0, schedule=lambda progress: 1 - progress)
    made = optimized(module)
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for step in range(240):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * (1 - step / 240))
        optimizer.step()
        scheduler.step()


def test_nanogpt_starts_with_small_weights_and_smaller_ones_at_the_ends_of_branches() -> None:
    module = NanoGPT(65, layers=2, width=384)
    ends = [block.attention.out for block in module.blocks] + [block.mlp[2] for block in module.blocks]
    for layer in ends:
        assert layer.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)
    for weight in (module.tokens.weight, module.positions.weight, module.blocks[0].attention.qkv.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
