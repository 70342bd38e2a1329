"""The whole path: planted truth is found, and scores do not depend on how the work is cut."""

from __future__ import annotations

from functools import cache
from typing import Any

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin, AttributionResult, FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK, GradCos
from lightning_attr.store import feature_store as store_module

# The shared module has a validation step; not every test validates.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


# Planted truth ------------------------------------------------------------------------------------------------------


class DigitClassifier(AttributionMixin, L.LightningModule):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@cache
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


def fitted(data: TensorDataset, mask: Tensor | None = None, classes: int = 10) -> L.Trainer:
    callback = AttributionCallback("run", method=TRAK(proj_dim=1024), noise_mask=mask, log=False)
    trainer = quiet_trainer(max_epochs=6, callbacks=[callback])
    torch.manual_seed(0)
    trainer.fit(DigitClassifier(classes), loader_of(data, batch_size=32, shuffle=True))
    return trainer


def test_planted_label_noise_is_found() -> None:
    x, y = (tensor[:700] for tensor in digits())
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(len(y), generator=generator) < 0.1
    shift = torch.randint(1, 10, (len(y),), generator=generator)
    flipped = torch.where(mask, (y + shift) % 10, y)
    trainer = fitted(TensorDataset(x, flipped), mask)
    result = attribute(trainer, target_dataloaders=loader_of(TensorDataset(*(t[700:800] for t in digits())), 50))
    assert result.metrics["noisy_label_auroc"] > 0.9
    assert result.metrics["noisy_label_recall@10%"] > 0.5
    assert result.metrics["selection_noise_share@10%"] > 0.3
    kept = result.select(0.9, by="self_influence")
    assert mask[kept].float().mean() < mask.float().mean() / 2


@pytest.mark.parametrize("method", [None, TRAK, GradCos])
@pytest.mark.parametrize("flipped", [False, True])
def test_copy_of_a_target_is_its_top_proponent_or_flipped_its_top_opponent(flipped: bool, method: Any) -> None:
    """Ten classes, or even against odd, where a flipped label pulls just the other way."""
    x, y = (tensor[:304] for tensor in digits())
    y = y % 2 if flipped else y
    planted = 1 - y[300:] if flipped else y[300:]
    trainer = fitted(TensorDataset(x, torch.cat([y[:300], planted])), classes=2 if flipped else 10)
    projector = TRAK(proj_dim=1024).projector
    chosen = {None: None, TRAK: TRAK(projector=projector, balanced=False), GradCos: GradCos(projector)}[method]
    targets = loader_of(TensorDataset(x[300:], y[300:]))
    scores = attribute(trainer, target_dataloaders=targets, method=chosen).scores
    # Where every snapshot has an equal part, the late ones count, in which a copy that is fitted pushes little; and the
    # random directions of ten classes make a kernel that is right in the mean.
    among = 3 if method is not GradCos and not flipped else 1
    found, values = scores.bottomk(among) if flipped else scores.topk(among)
    assert all(row in own for row, own in zip([300, 301, 302, 303], found.tolist(), strict=True))
    assert (values < 0).all() if flipped else (values > 0).all()


# Invariance ---------------------------------------------------------------------------------------------------------

TRAIN, TARGETS = blobs(30), blobs(9, seed=1)


class Augmented(torch.utils.data.Dataset[Any]):
    """A random view of each sample."""

    def __len__(self) -> int:
        return len(TRAIN)

    def __getitem__(self, row: int) -> Any:
        x, y = TRAIN[row]
        return x + 0.1 * torch.randn(4), y


def scored(
    train: Any = TRAIN, batch_size: int = 8, workers: int = 0, shuffle: bool = False, kernel: str = "auto"
) -> AttributionResult:
    settings: dict[str, Any] = {"num_workers": workers, "shuffle": shuffle}
    return attribute(
        quiet_trainer(precision="64-true"),
        model=BlobClassifier(),
        train_dataloaders=loader_of(train, batch_size, **settings),
        target_dataloaders=loader_of(TARGETS, batch_size, **settings),
        method=TRAK(proj_dim=16, kernel=kernel),
    )


@pytest.mark.parametrize("train", [TRAIN, Augmented()], ids=["plain", "augmented"])
@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_scores_do_not_depend_on_the_batch_size(batch_size: int, train: Any) -> None:
    torch.testing.assert_close(
        scored(train, batch_size).scores.values, scored(train).scores.values, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("train", [TRAIN, Augmented()], ids=["plain", "augmented"])
def test_scores_do_not_depend_on_workers_or_the_order_of_loaders(train: Any) -> None:
    expected = scored(train, batch_size=3)
    for settings in ({"workers": 2}, {"shuffle": True}):
        found = scored(train, batch_size=3, **settings)
        assert torch.equal(found.scores.values, expected.scores.values)
        assert torch.equal(found.self_influence, expected.self_influence)


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_scores_do_not_depend_on_the_rows_of_a_shard(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scored()
    monkeypatch.setattr(store_module, "_SHARD_ROWS", rows)
    found = scored()
    torch.testing.assert_close(found.scores.values, expected.scores.values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.self_influence, expected.self_influence, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.loss, expected.loss)


def test_permuted_data_permute_the_scores() -> None:
    """Second directions are drawn by row: without them."""
    order = torch.randperm(len(TRAIN))
    permuted = TensorDataset(*(tensor[order] for tensor in TRAIN.tensors))
    expected, found = scored(kernel="margin"), scored(permuted, kernel="margin")
    torch.testing.assert_close(found.scores.values, expected.scores.values[order], rtol=1e-5, atol=1e-6)
    assert torch.equal(found.labels, expected.labels[order])


def test_merged_runs_are_attributed_as_one_ensemble() -> None:
    for seed in (0, 1):
        callback = AttributionCallback(f"run{seed}", method=TRAK(proj_dim=16), log=False)
        trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
        trainer.fit(BlobClassifier(seed=seed), loader_of(TRAIN, shuffle=True))
    FeatureStore.merge(["run0", "run1"], "merged")
    given = {"train_dataloaders": loader_of(TRAIN), "target_dataloaders": loader_of(TARGETS), "model": BlobClassifier()}
    given["method"] = TRAK(proj_dim=16, balanced=False)
    single = [attribute(quiet_trainer(), store=f"run{seed}", **given).scores.values for seed in (0, 1)]
    merged = attribute(quiet_trainer(), store="merged", **given)
    assert len(merged.scores.provenance["snapshots"]) == 4
    torch.testing.assert_close(merged.scores.values, (single[0] + single[1]) / 2, rtol=1e-4, atol=1e-5)
    balanced = attribute(quiet_trainer(), store="merged", **{**given, "method": TRAK(proj_dim=16)})
    assert balanced.scores.shape == merged.scores.shape
    assert not torch.equal(balanced.scores.values, merged.scores.values)
