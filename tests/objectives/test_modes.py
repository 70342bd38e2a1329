"""Eval against train mode: what is chosen, what is said, and that train mode gives the gradients of training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr import AttributionMixin, AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.gradients.mode_reads import watch_mode
from lightning_attr.methods import GradDot, Influence
from lightning_attr.objectives.mode_choice import choose_mode
from lightning_attr.objectives.modes import MeanNoise, check_mode, in_mode, seeded, set_mode
from lightning_attr.outputs import NegativeLoss
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector
from lightning_attr.randomness.streams import hashed_seed
from lightning_attr.store.feature_store import FeatureStore

Batch = tuple[Tensor, Tensor]


class Plain(L.LightningModule):
    """Dropout and BatchNorm: all that differs between the modes is noise and statistics."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(rate))
        self.head, self.aux = nn.Linear(6, 3), nn.Linear(6, 3)

    def terms(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1], reduction="none")

    def training_step(self, batch: Batch) -> Tensor:
        return self.terms(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Auxiliary(Plain):
    """A head whose loss is there in train mode only."""

    def terms(self, batch: Batch) -> Tensor:
        h = self.body(batch[0])
        losses = F.cross_entropy(self.head(h), batch[1], reduction="none")
        return losses + 0.4 * F.cross_entropy(self.aux(h), batch[1], reduction="none") if self.training else losses


class OtherForm(Plain):
    """Returns something else in eval mode."""

    def terms(self, batch: Batch) -> Tensor:
        h = self.body(batch[0])
        outputs = (self.head(h), self.aux(h)) if self.training else self.head(h)
        first, second = outputs
        return F.cross_entropy(first, batch[1], reduction="none") + F.cross_entropy(second, batch[1], reduction="none")


class NoGraph(Plain):
    """A slope that has no gradient in eval mode, with the same loss."""

    def terms(self, batch: Batch) -> Tensor:
        x = batch[0].clone().requires_grad_()
        energy = self.head(self.body(x))[:, 0]
        (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=self.training, retain_graph=True)
        return energy.square() + slope.square().sum(1)


class Functional(Plain):
    """Dropout, dropped paths and noise by functions."""

    def terms(self, batch: Batch) -> Tensor:
        h = F.dropout(self.body(batch[0]), 0.3, self.training)
        if self.training:
            h = h * h.new_empty(len(h), 1).bernoulli_(0.8).div_(0.8) + 0.1 * torch.randn_like(h)
        return F.cross_entropy(self.head(h), batch[1], reduction="none")


class Jitter(Plain):
    """Random in a way that has no mean to put in its place."""

    def terms(self, batch: Batch) -> Tensor:
        scale = float(torch.randint(1, 1000, ())) if self.training else 1.0
        return super().terms(batch) * scale


class OfTheMixin(AttributionMixin, Auxiliary):
    model_output = NegativeLoss(lambda terms, _: terms)

    def attribution_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.terms(batch), batch[1]


def _batch(n: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def _module(cls: type[Plain], **kwargs: Any) -> Plain:
    torch.manual_seed(1)
    module = cls(**kwargs).double().eval()
    batch_norm = module.body[1]
    batch_norm.running_mean.normal_()
    batch_norm.running_var.uniform_(0.5, 2)
    return module


def _features(module: Any, batch: Batch, rows: Sequence[int], found: Any) -> Tensor:
    projection = IdentityProjector().bind(ParameterLayout.of(module), "")
    return Featurizer(module, found, projection, snapshot="s")(batch, rows)["features"]


def _by_autograd(module: Any, batch: Batch, seeds: Sequence[int | None]) -> Tensor:
    rows = []
    for i, seed in enumerate(seeds):
        with in_mode(module, "train"), seeded(seed):
            term = module.terms((batch[0][i : i + 1], batch[1][i : i + 1]))[0]
        found = torch.autograd.grad(-term, list(module.parameters()), materialize_grads=True)
        rows.append(torch.cat([row.flatten() for row in found]))
    return torch.stack(rows)


# The choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Plain, Functional])
def test_noise_and_statistics_are_no_reason_for_train_mode(cls: type[Plain], caplog: pytest.LogCaptureFixture) -> None:
    module = _module(cls)
    assert choose_mode(module, _batch()) == "eval"
    assert caplog.messages == []
    assert not any(layer.training for layer in module.modules())


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (
            Auxiliary,
            r"Auxiliary: the loss of `training_step` depends on `self.training` \([\d.]+ in eval mode, [\d.]+ in",
        ),
        (NoGraph, r"NoGraph: the loss of .* \(its gradient differs by \d+ % of its size"),
        (
            OtherForm,
            r"OtherForm: the loss of .* cannot be computed in eval mode \(ValueError: .*train mode",
        ),
    ],
)
def test_a_loss_that_needs_train_mode_gets_it(cls: type[Plain], said: str, caplog: pytest.LogCaptureFixture) -> None:
    module = _module(cls, rate=0.0)
    found = plan(module, _batch(4), 4)
    assert (found.mode, found.seeded) == ("train", False)
    assert any(re.match(said, message) for message in caplog.messages)
    assert module.training
    assert not module.body[1].training
    batch = _batch()
    torch.testing.assert_close(_features(module, batch, range(6), found), _by_autograd(module, batch, [None] * 6))


def test_the_choice_of_the_user_is_final(caplog: pytest.LogCaptureFixture) -> None:
    module = _module(Auxiliary, rate=0.0)
    assert plan(module, _batch(4), 4, mode="eval").mode == "eval"
    assert not module.training
    assert plan(module, _batch(4), 4, mode="train").mode == "train"
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("cls", "said"), [(Jitter, "; in train mode it is random"), (OfTheMixin, "attributed in eval mode. Pass mode")]
)
def test_eval_mode_remains_with_a_word(cls: type[Plain], said: str, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_mode(_module(cls), _batch()) == "eval"
    assert said in caplog.text


@pytest.mark.parametrize("mode", ["test", 1, True])
def test_other_modes_are_refused(mode: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected argument `mode` to be 'eval', 'train' or None, but got"):
        check_mode(mode)
    with pytest.raises(ValueError, match="Expected argument `mode`"):
        AttributionCallback(tmp_path, mode=mode)


# Train mode with dropout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Plain, Functional, OfTheMixin])
def test_random_numbers_belong_to_samples(cls: type[Plain], caplog: pytest.LogCaptureFixture) -> None:
    module, batch = _module(cls), _batch()
    found = plan(module, _batch(4), 4, mode="train")
    assert found.seeded
    assert f"{cls.__name__} is random in train mode (dropout, noise): each sample goes through on its" in caplog.text
    whole = _features(module, batch, range(6), found)
    seeds = [hashed_seed("mode", "s", 0, row) for row in range(6)]
    torch.testing.assert_close(whole, _by_autograd(module, batch, seeds))
    order = [4, 1, 5]
    part = _features(module, (batch[0][order], batch[1][order]), order, found)
    torch.testing.assert_close(part, whole[order], rtol=0, atol=0)
    assert not torch.allclose(whole, _features(module, batch, range(10, 16), found))


def test_methods_that_run_the_module_refuse_random_numbers(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(*_batch(8)), 4)
    trainer = AttributionTrainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    with pytest.raises(AttributionError, match=r'nothing random in train mode.*TRAK, TracIn.*or mode="eval"'):
        trainer.attribute(
            model=_module(Plain),
            train_dataloaders=loader,
            targets="train",
            method=Influence("empirical_fisher", solver="cg"),
            mode="train",
        )


# Means in the place of noise ---------------------------------------------------------------------------------------


def test_means_take_the_place_of_noise() -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    lstm = nn.LSTM(5, 4, 2, dropout=0.5)
    with torch.no_grad():
        quiet = lstm.eval()(x)[0]
    lstm.train()
    with MeanNoise():
        assert torch.equal(F.dropout(x, 0.3), x)
        assert torch.equal(F.dropout1d(x, 0.3), x)
        assert torch.equal(torch.native_dropout(x, 0.3, True)[0], x)
        (slope,) = torch.autograd.grad(torch.native_dropout(x, 0.3, True)[0].sum(), x)
        assert torch.equal(slope, torch.ones_like(x))
        torch.testing.assert_close(lstm(x)[0], quiet)
        torch.testing.assert_close(
            F.scaled_dot_product_attention(x, x, x, dropout_p=0.4), F.scaled_dot_product_attention(x, x, x)
        )
        assert not (torch.randn(2, generator=torch.Generator()) + torch.randn_like(x).sum()).any()
        assert torch.equal(torch.normal(x, 1.0), x)
        assert torch.equal(torch.rand(2), torch.full((2,), 0.5))
        assert torch.equal(torch.randperm(3), torch.arange(3))
        assert torch.equal(torch.bernoulli(torch.full((2,), 0.3)), torch.full((2,), 0.3))
        assert torch.equal(torch.distributions.Normal(x, 1.0).rsample(), x)
        assert torch.equal(torch.zeros(2).exponential_(2.0), torch.full((2,), 0.5))
    assert torch.randn(100).any()


def test_a_mode_leaves_no_trace() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(), nn.BatchNorm1d(2, track_running_stats=False))
    with in_mode(module, "train", dropout=False):
        assert [layer.training for layer in module] == [False, False, True]
        assert module.training
    assert all(layer.training for layer in module)
    set_mode(module, "eval")
    assert not any(layer.training for layer in module.modules())


# The whole way ----------------------------------------------------------------------------------------------------


def test_a_run_records_its_mode_and_attributes_in_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x, y = _batch(8)
    loader = DataLoader(TensorDataset(x.float(), y), 4)
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
    }
    weights = []
    for callbacks in ([], [AttributionCallback(tmp_path / "store")]):
        module = _module(Auxiliary).float()
        torch.manual_seed(3)
        trainer = AttributionTrainer(max_epochs=2, callbacks=callbacks, **quiet)
        trainer.fit(module, loader)
        weights.append(torch.cat([t.double().flatten() for t in module.state_dict().values()]))
    assert torch.equal(*weights)
    assert FeatureStore.open(tmp_path / "store").fingerprint.mode == "train"
    caplog.clear()
    result = trainer.attribute(targets="train")
    assert result.scores.provenance["mode"] == "train"
    assert "self.training" not in caplog.text
    exact = trainer.attribute(targets="train", method=GradDot(exact=True))
    key = FeatureStore.open(tmp_path / "store").snapshots[-1].projection
    seeds = [hashed_seed("mode", key, 0, row) for row in range(8)]
    rows = _by_autograd(module, (x.float(), y), seeds)
    torch.testing.assert_close(exact.self_influence.double(), rows.double().square().sum(1), rtol=1e-4, atol=1e-6)
    with pytest.raises(StoreMismatchError, match=r"written in train mode \(mode='train'\), but here it would be mode"):
        trainer.attribute(targets="train", mode="eval")


# Who looks at the mode ---------------------------------------------------------------------------------------------


def test_layers_of_torch_are_no_readers_of_the_mode() -> None:
    with watch_mode(_module(Plain)) as reads:
        _module(Plain).training_step(_batch())
        nn.LSTM(2, 2, dropout=0.1, num_layers=2)(torch.ones(1, 1, 2))
    assert not reads.seen
    assert "training" not in vars(nn.Module)


@pytest.mark.parametrize("cls", [Auxiliary, Functional, OfTheMixin])
def test_code_that_looks_at_its_mode_is_seen(cls: type[Plain]) -> None:
    module = _module(cls)
    with watch_mode(module) as reads:
        module.terms(_batch())
    assert reads.seen
    assert module.training is False


def test_a_train_of_its_own_counts_as_looking() -> None:
    class Own(Plain):
        def train(self, mode: bool = True) -> Own:
            self.careful = not mode
            return super().train(mode)

    with watch_mode(Own()) as reads:
        assert reads.seen


def test_modes_are_set_while_they_are_watched() -> None:
    module = nn.Sequential(nn.Dropout())
    with watch_mode(module):
        module.eval()
        assert not module[0].training
    assert not module.training
