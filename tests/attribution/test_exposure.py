"""How often each sample was trained on: counted by a data set that sees itself read, in results and their files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import SubsetRandomSampler, WeightedRandomSampler
from typing_extensions import override

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionResult
from lightning_attr.attribution.exposure import exposure_of
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK, GradDot

N = 20


class Seen(L.Callback):
    """Counts the samples that training steps saw, by their first entry."""

    def __init__(self) -> None:
        self.row = {x[0].item(): row for row, x in enumerate(blobs(N).tensors[0])}
        self.counts: Counter[int] = Counter()

    @override
    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.counts.update(self.row[x[0].item()] for x in batch[0])


def fit(folder: Path, loader: Any, **settings: Any) -> tuple[Any, Seen]:
    seen = Seen()
    recorder = AttributionCallback(folder, TRAK(8), "all", featurize=False, **settings.pop("own", {}))
    trainer = quiet_trainer(**{"max_epochs": 3, **settings}, callbacks=[recorder, seen])
    torch.manual_seed(3)
    trainer.fit(BlobClassifier(), loader)
    return trainer, seen


def attribute(trainer: Any) -> AttributionResult:
    return trainer.attribute(target_dataloaders=loader_of(blobs(4, seed=1)), method=GradDot())


@pytest.mark.parametrize(
    ("loader", "settings"),
    [
        ({"shuffle": True}, {}),
        ({"shuffle": True, "drop_last": True}, {}),
        ({"shuffle": True}, {"limit_train_batches": 1, "max_epochs": 2}),
        ({"shuffle": True}, {"accumulate_grad_batches": 2}),
        ({"sampler": SubsetRandomSampler(range(0, N, 2))}, {}),
        ({"sampler": WeightedRandomSampler([1.0] * 5 + [0.2] * 15, 12)}, {}),
    ],
    ids=lambda value: "",
)
def test_exposure_is_what_training_saw(tmp_path: Path, loader: Any, settings: Any) -> None:
    trainer, seen = fit(tmp_path / "store", loader_of(blobs(N), batch_size=6, **loader), **settings)
    expected = torch.tensor([seen.counts[row] for row in range(N)])
    result = attribute(trainer)
    assert torch.equal(result.exposure, expected)
    if expected.all():
        assert result.trained_on is None
    else:
        assert torch.equal(result.trained_on, expected > 0)
        assert not result.scores.values[expected == 0].any()
        assert set(result.scores.topk(2)[0].flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    result.save(tmp_path / "result")
    assert torch.equal(AttributionResult.load(tmp_path / "result").exposure, expected)


def test_it_counts_up_to_the_last_snapshot_that_is_attributed(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, loader_of(blobs(N), batch_size=6, shuffle=True))
    store = trainer.callbacks[0].store
    for count in (1, 2, 3):
        found = exposure_of(store, store.snapshots[:count], N)
        assert found is not None
        assert torch.equal(found, torch.full((N,), count))


def test_nobody_knows_without_a_journal(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, loader_of(blobs(N), batch_size=6, shuffle=True), own={"journal": False})
    result = attribute(trainer)
    assert result.exposure is None
    assert result.trained_on is None


def test_a_damaged_journal_is_told_and_scores_are_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = fit(tmp_path, loader_of(blobs(N), batch_size=6))
    (chunk, *_) = sorted((tmp_path / "journal").rglob("*.safetensors"))
    chunk.write_bytes(chunk.read_bytes()[:-3])
    result = attribute(trainer)
    assert result.exposure is None
    assert result.scores.values.any()
    assert "How often each sample was trained on is not known" in caplog.text
