"""Random numbers of samples: the same for any batch; and model outputs that are means over them."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cases import Tally, loader_of, quiet_trainer
from lightning_attr import AttributionMixin, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.data.loader import DataSource
from lightning_attr.evaluation.targets import outputs_at
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.methods import GradDot
from lightning_attr.outputs import NegativeLoss
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector
from lightning_attr.randomness.draws import Draw, Samples

KINDS = {
    "normal": lambda draw: draw.normal(3, 2),
    "integers": lambda draw: draw.integers(10, 4),
    "scalar": lambda draw: draw.integers(10),
    "others": lambda draw: draw.others(20, 5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_each_samples_own(kind: str) -> None:
    draw = KINDS[kind]
    rows = [7, 0, 12, 3]
    together = draw(Draw(rows, "a"))
    apart = torch.cat([draw(Draw([row], "a")) for row in rows])
    assert torch.equal(together, apart)
    assert len({tuple(row.flatten().tolist()) for row in together}) > 1
    assert not torch.equal(together, draw(Draw(rows, "b")))
    assert not torch.equal(together, draw(Draw(rows, "a", number=1)))


def test_streams_are_apart() -> None:
    draw = Draw([0])
    assert not torch.equal(draw.normal(4), draw.normal(4, stream="other"))
    assert not torch.equal(draw.integers(1000, 8), draw.integers(1000, 8, stream="other"))


def test_distributions() -> None:
    draw = Draw(range(2000))
    x = draw.normal(4)
    assert abs(x.mean()) < 0.05
    assert abs(x.std() - 1) < 0.05
    counts = draw.integers(10).bincount(minlength=10)
    assert counts.min() > 150
    assert counts.max() < 250


def test_others_are_others() -> None:
    chosen = Draw(range(6)).others(6, 5)
    for row, others in enumerate(chosen.tolist()):
        assert sorted([row, *others]) == list(range(6))
    beyond = Draw([9]).others(6, 5)  # a target, which is none of the population
    assert len(set(beyond[0].tolist())) == 5
    for size in (0, 6):
        with pytest.raises(ValueError, match=f"between 1 and 5 others among 6 samples, but got {size}"):
            Draw([0]).others(6, size)


def test_samples_of_wanted_rows() -> None:
    samples = Samples(5, lambda rows: iter([(rows, torch.arange(5)[list(rows)])]))
    assert len(samples) == 5
    ((rows, batch),) = samples.batches()
    assert list(rows) == batch.tolist() == [0, 1, 2, 3, 4]
    ((rows, batch),) = samples.batches([4, 2])
    assert batch.tolist() == [4, 2]


class Denoiser(AttributionMixin, L.LightningModule):
    """Predicts the noise that was added; what is attributed is the mean over draws of noise."""

    model_output = NegativeLoss(lambda outputs, targets: (outputs - targets).square().mean(1))
    attribution_draws = 3

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(2, 2)
        self.set_up = Tally()

    def attribution_setup(self, samples: Samples, snapshot: str) -> None:
        assert not torch.is_grad_enabled()
        self.set_up.append((snapshot, sum(len(rows) for rows, _ in samples.batches())))

    def attribution_batch(self, batch: Any, draw: Draw) -> Any:
        return {"x": batch[0], "noise": draw.normal(2).to(batch[0])}

    def attribution_step(self, batch: Any) -> Any:
        return self.network(batch["x"] + batch["noise"]), batch["noise"]

    def training_step(self, batch: Any) -> Tensor:
        noise = torch.randn_like(batch[0])
        return (self.network(batch[0] + noise) - noise).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


DATA = TensorDataset(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))


def loss(model: Denoiser, x: Tensor, noise: Tensor) -> Tensor:
    return (model.network(x + noise) - noise).square().mean()


def features(model: Denoiser, snapshot: str, batches: list[list[int]]) -> dict[str, Tensor]:
    model.eval()
    made = plan(model, (DATA.tensors[0][:4].double(),), 4)
    projection = IdentityProjector().bind(ParameterLayout.of(model), snapshot)
    featurizer = Featurizer(model, made, projection, snapshot=snapshot)
    parts = [featurizer((DATA.tensors[0][rows].double(),), rows) for rows in batches]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3, 4, 5]], [[0], [1, 2], [3, 4, 5]]])
def test_features_are_means_over_the_draws(batches: list[list[int]]) -> None:
    model = Denoiser().double()
    found = features(model, "final", batches)
    for row in range(6):
        noises = [Draw([row], "final", number).normal(2)[0].double() for number in range(3)]
        value = sum(-loss(model, DATA.tensors[0][row].double(), noise) for noise in noises) / 3
        gradient = torch.autograd.grad(value, list(model.parameters()))
        torch.testing.assert_close(found["features"][row], torch.cat([g.flatten() for g in gradient]))
        torch.testing.assert_close(found["output"][row], value.detach())
        torch.testing.assert_close(found["loss"][row], -value.detach())
        assert found["out_to_loss"][row] == 1


def test_each_snapshot_has_noise_of_its_own() -> None:
    model = Denoiser().double()
    everything = [list(range(6))]
    assert not torch.equal(features(model, "a", everything)["features"], features(model, "b", everything)["features"])


def test_the_callback_and_attribute_draw_alike(tmp_path: Any) -> None:
    model, loader = Denoiser(), loader_of(DATA, batch_size=4)
    callback = AttributionCallback(
        tmp_path / "run", method=GradDot(IdentityProjector()), feature_dtype="float32", log=False
    )
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(model, loader)
    keys = [snapshot.key for snapshot in callback.store.snapshots]
    assert [*model.set_up] == [("", 6), *[(key, 6) for key in keys]]
    recorded = trainer.attribute(train_dataloaders=loader, target_dataloaders=loader)
    torch.testing.assert_close(recorded.self_influence, recorded.scores.values.diagonal())
    assert [*model.set_up][3:] == [("", 6), (keys[-1], 6)]  # GradDot uses the last one
    for row in range(6):
        noises = [Draw([row], keys[-1], number).normal(2)[0] for number in range(3)]
        expected = sum(loss(model, DATA.tensors[0][row], noise) for noise in noises).item() / 3
        assert recorded.loss[row].item() == pytest.approx(expected, rel=1e-5)


def test_targets_do_not_get_the_noise_of_training_samples() -> None:
    model, x = Denoiser(), torch.randn(2, 2)
    method = GradDot(IdentityProjector())
    loaders = {"train_dataloaders": loader_of(DATA), "target_dataloaders": loader_of(TensorDataset(x))}
    result = attribute(quiet_trainer(), model=model, method=method, **loaders)

    def gradient(sample: Tensor, row: int) -> Tensor:
        noises = [Draw([row], "current", number).normal(2)[0] for number in range(3)]
        value = -sum(loss(model, sample, noise) for noise in noises) / 3
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])

    expected = [[gradient(DATA[i][0], i) @ gradient(x[j], 6 + j) for j in range(2)] for i in range(6)]
    torch.testing.assert_close(result.scores.values, torch.tensor(expected), rtol=1e-2, atol=1e-3)


def test_ground_truth_is_the_mean_over_the_draws() -> None:
    model = Denoiser().eval()
    found = outputs_at(
        quiet_trainer(), model, None, DataSource.of(loader_of(DATA, batch_size=4), "target"), [lambda: None]
    )
    for row in range(6):
        noises = [Draw([row], "", number).normal(2)[0] for number in range(3)]
        expected = -sum(loss(model, DATA.tensors[0][row], noise) for noise in noises).item() / 3
        assert found[0, row].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("draws", [0, 2.0, "many"])
def test_a_number_of_draws_that_is_none(draws: Any) -> None:
    class Wrong(Denoiser):
        attribution_draws = draws

    with pytest.raises(ValueError, match=f"`attribution_draws` of Wrong to be a positive integer, but got {draws!r}"):
        features(Wrong().double(), "", [[0]])


def test_modules_without_the_mixin_have_no_draws() -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Linear(2, 1)

        def training_step(self, batch: Any) -> Tensor:
            return self.network(batch[0]).mean()

    result = attribute(quiet_trainer(), model=Plain(), train_dataloaders=loader_of(DATA), targets="train")
    assert result.scores.shape == (6, 6)
