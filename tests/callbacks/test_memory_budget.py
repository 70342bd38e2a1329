"""The memory budget from end to end: what it changes, and what is said when it is too small."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import MemoryBudgetError


def test_scores_do_not_depend_on_it_and_the_split_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    with caplog.at_level(logging.WARNING, logger="lightning_attr"):
        for name, budget in (("free", None), ("bounded", 3_000)):
            callback = AttributionCallback(tmp_path / name, memory_budget=budget, featurize=True)
            trainer = quiet_trainer(max_epochs=3, callbacks=[callback])
            trainer.fit(BlobClassifier(), loader_of(blobs(24), batch_size=12))
            said = [message for message in caplog.messages if "memory budget" in message]
            assert len(said) == (budget is not None)
            found.append(trainer.attribute(targets="train", memory_budget=budget).scores.values)
    torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=1e-4)
    assert said[0].startswith("Featurizing in parts of ")


def test_too_small_a_budget_fails_before_training(tmp_path: Path) -> None:
    module = BlobClassifier()
    before = [p.clone() for p in module.parameters()]
    trainer = quiet_trainer(max_epochs=1, callbacks=[AttributionCallback(tmp_path, memory_budget=100)])
    with pytest.raises(MemoryBudgetError, match=r"One sample needs about .* Raise `memory_budget` to at least"):
        trainer.fit(module, loader_of(blobs(24)))
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    trainer = quiet_trainer()
    with pytest.raises(MemoryBudgetError, match="One sample needs about"):
        trainer.attribute(model=module, train_dataloaders=loader_of(blobs(8)), targets="train", memory_budget=100)
    assert not (tmp_path / "manifest.json").exists()


def test_bad_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="of AttributionCallback to be an integer >= 1, or None, but got 0"):
        AttributionCallback(memory_budget=0)


@pytest.mark.parametrize(
    ("settings", "collated", "rows"), [({}, False, 1024), ({"batch_size": 8}, False, 8), ({}, True, 8)]
)
def test_small_samples_are_featurized_in_larger_batches(
    tmp_path: Path, settings: dict[str, int], collated: bool, rows: int
) -> None:
    callback = AttributionCallback(tmp_path, **settings)
    own = {"collate_fn": lambda samples: default_collate(samples)} if collated else {}  # may pad, for all that is known
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(BlobClassifier(), loader_of(blobs(24), batch_size=8, **own))
    assert callback.source.batch_size == rows
