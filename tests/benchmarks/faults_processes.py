"""Several processes: every method scores as one process does, and where one rank fails, none waits for it."""

from __future__ import annotations

import argparse
import logging
import pkgutil
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from method_cases import CASES, N_TRAIN, Classifier, record, scored, training_data
from process_cases import connect, run

from cases import loader_of, quiet_trainer
from lightning_attr import AttributionResult
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK

__all__ = ["METHODS", "PHASES", "Phase", "failing", "methods", "rows"]

COUNTS = (1, 2, 3, 4)
METHODS = [case for case in CASES if "two processes" not in case.except_for]
_SECONDS = 150.0  # no group here takes a third of it, on a machine that is busy
_RANKS = 2


# Every method -------------------------------------------------------------------------------------------------------


def attribute_all(rank: int, count: int, group: dict[str, str], folder: Path) -> None:
    """Score with every method, each on a store of its own."""
    connect(rank, count, group)
    for number, case in enumerate(METHODS):
        trainer = quiet_trainer(strategy="ddp" if count > 1 else "auto", devices=count)
        store = folder / "stores" / str(number)
        scored(case.make(), store, trainer=trainer, batch_size=5).save(folder / f"{number}-{rank}")


def equal(one: AttributionResult, folder: Path, number: int, ranks: int) -> bool:
    """Whether every rank has the result of one process."""
    try:
        found = [AttributionResult.load(folder / f"{number}-{rank}") for rank in range(ranks)]
    except (OSError, ValueError) as error:
        print(f"{METHODS[number].name}: {error}")
        return False
    gaps = [(other.scores.values - one.scores.values).norm() / one.scores.values.norm() for other in found]
    own = [torch.allclose(other.self_influence, one.self_influence, rtol=1e-4, atol=1e-6) for other in found]
    if not (max(gaps) < 1e-4 and all(own)):
        print(f"{METHODS[number].name}: scores differ by {max(gaps):.1e}, self-influence equal: {own}")
    return bool(max(gaps) < 1e-4) and all(own) and all(torch.equal(other.loss, one.loss) for other in found)


def methods(counts: tuple[int, ...] = COUNTS) -> list[dict[str, Any]]:
    """Every method on so many processes, beside one."""
    found = []
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            run_of = record(Path(name) / "run", shard_rows=N_TRAIN)
            for number in range(len(METHODS)):
                shutil.copytree(run_of, Path(name) / "one" / str(number))
                shutil.copytree(run_of, Path(name) / "stores" / str(number))
            expected = [
                scored(case.make(), Path(name) / "one" / str(number), batch_size=5)
                for number, case in enumerate(METHODS)
            ]
            ended = run(count, attribute_all, Path(name), seconds=2 * _SECONDS)
            same = [equal(one, Path(name), number, count) for number, one in enumerate(expected)]
        waiting = sum(code is None for code in ended)
        row = {"tried": len(same), "equal": sum(same), "other": len(same) - sum(same), "waiting": waiting}
        found.append({"table": "every method, one shard", "what": f"on {count} process(es)", **row})
    return found


# One rank fails -----------------------------------------------------------------------------------------------------


class PlantedError(OSError):
    """What the disk of one rank says."""


@dataclass(frozen=True)
class Phase:
    """A moment in which something fails.

    Args:
        run: "attribute", "fit", or "start" for what a fit does before its first step.
        what: the moment, in words.
        owner: whose call fails, as module or class, by its full name.
        name: the call.
        ranks: that make the call.
        after: calls that go well before.
    """

    run: str
    what: str
    owner: str
    name: str
    ranks: tuple[int, ...] = (0, 1)
    after: int = 0

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Let the call fail."""
        target, calls = f"lightning_attr.{self.owner}.{self.name}", Counter[str]()
        whole = pkgutil.resolve_name(target)

        def fail(*args: Any, **kwargs: Any) -> Any:
            calls["made"] += 1
            if calls["made"] > self.after:
                raise PlantedError("the disk is gone")
            return whole(*args, **kwargs)

        with mock.patch(target, fail):
            yield
        if calls["made"] <= self.after:
            raise AssertionError(f"{target} was not called so often")


_STEP, _RUN, _CALLBACK = "attribution.predict_step", "attribution.run", "callbacks.attribution"
_RESTORER, _ASSEMBLY = "attribution.restorer", "attribution.assembly"
_STORE = "store.feature_store.FeatureStore"
PHASES = [
    Phase("attribute", "reading the arguments", "attribution.trainer", "resolve"),
    Phase("attribute", "making a folder", _RUN, "tempfile.TemporaryDirectory"),
    Phase("attribute", "lending the trainer", _RUN, "lent"),
    Phase("attribute", "making the store", _STEP, "ready_store", ranks=(0,)),
    Phase("attribute", "opening the store", _STEP, "open_store"),
    Phase("attribute", "planning the work", _STEP, "WorkDivision"),
    Phase("attribute", "loading weights", _RESTORER, "load_weights"),
    Phase("attribute", "setting the module up", _RESTORER, "set_up_at"),
    Phase("attribute", "moving a batch", _STEP, "placed"),
    Phase("attribute", "featurizing", "features.featurizer.Featurizer", "__call__"),
    Phase("attribute", "writing features", _STORE, "write_shard", ranks=(0,)),
    Phase("attribute", "entering shards", _STORE, "adopt", ranks=(0,)),
    Phase("attribute", "reading the store anew", _STORE, "reload"),
    Phase("attribute", "scoring", _ASSEMBLY, "score"),
    Phase("attribute", "describing the scores", _ASSEMBLY, "provenance_of"),
    Phase("start", "finding the data", "callbacks.preparation", "train_source"),
    Phase("start", "looking at the module", "callbacks.preparation", "tried"),
    Phase("start", "making the store", _STORE, "create", ranks=(0,)),
    Phase("start", "opening the store", _STORE, "open"),
    Phase("start", "announcing", _CALLBACK, "announce"),
    Phase("fit", "learning rates", "parameters.learning_rates.LearningRates", "add"),
    Phase("fit", "leaving training alone", "callbacks.snapshot_recorder", "beside_training"),
    Phase("fit", "taking a snapshot", _STORE, "add_snapshot", ranks=(0,)),
    Phase("fit", "binding the projection", "methods.trak.TRAK", "projection_at", after=1),
    Phase("fit", "featurizing", "callbacks.snapshot_recorder", "featurize", ranks=(0,)),
    Phase("fit", "writing features", _STORE, "write_shard", ranks=(0,)),
    Phase("fit", "entering shards", _STORE, "adopt", ranks=(0,)),
    Phase("fit", "reading the store anew", _STORE, "reload", after=1),
    Phase("fit", "self-influence", "callbacks.reporting", "self_influence_at", ranks=(0,)),
    Phase("fit", "the last weights", "callbacks.run_store.RunStore", "finish"),
]


def attributes(folder: Path) -> str:
    """Score, into a store."""
    trainer = quiet_trainer(strategy="ddp", devices=_RANKS)
    scored(TRAK(proj_dim=16), folder, trainer=trainer)
    return "scored"


def fits(folder: Path) -> str:
    """Train two epochs; the sum of the weights says what came of it."""
    callback = AttributionCallback(folder, TRAK(proj_dim=16), "all", batch_size=8, log=True)
    callback.listeners.append(lambda *_: None)
    trainer = quiet_trainer(strategy="ddp", devices=_RANKS, max_epochs=2, callbacks=[callback])
    torch.manual_seed(0)
    module = Classifier()
    trainer.fit(module, loader_of(training_data(), batch_size=6))
    return str(sum(float(weight.double().sum()) for weight in module.parameters()))


def fail_in_turn(rank: int, count: int, group: dict[str, str], number: int, folder: Path) -> None:
    """Run well, then with each rank failing, then well again; note what is said."""
    connect(rank, count, group)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    phase = PHASES[number]
    work: Callable[[Path], str] = attributes if phase.run == "attribute" else fits
    for turn, failing in enumerate([-1, *phase.ranks, -1]):
        with ExitStack() as stack:
            if failing == rank:
                stack.enter_context(phase.planted())
            try:
                said = work(folder / str(turn))
            except Exception as error:  # what is counted here
                said = f"{type(error).__name__}: {error}"
        (folder / f"{turn}-{rank}").write_text(said)


def failing(number: int) -> tuple[int, int, int]:
    """Let a phase fail: how often, how often all ranks knew, and how many processes were still waiting."""
    phase = PHASES[number]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ended = run(_RANKS, fail_in_turn, number, folder, seconds=_SECONDS)
        turns = range(len(phase.ranks) + 2)
        said = [[(folder / f"{turn}-{rank}") for rank in range(_RANKS)] for turn in turns]
        texts = [[file.read_text() if file.exists() else "nothing" for file in files] for files in said]
    right = texts[0]
    well = texts[-1] == right and ended == [0] * _RANKS
    told = 0
    for found in texts[1:-1]:
        # A failure in recording never ends or changes a training; any other is heard by all.
        good = found == right if phase.run == "fit" else all("the disk is gone" in text for text in found)
        told += good and well
        if not (good and well):
            print(f"{phase.run}, {phase.what}: ended {ended}; {texts}")
    return len(phase.ranks), told, sum(code is None for code in ended)


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Try every method, and every phase."""
    found = methods()
    names = {"attribute": "attribute: all ranks say why", "start": "before training: all say why", "fit": "fit goes on"}
    for kind, what in names.items():
        counts = [failing(number) for number, phase in enumerate(PHASES) if phase.run == kind]
        tried, told, waiting = (sum(column) for column in zip(*counts, strict=True))
        row = {"tried": tried, "as it must": told, "other": tried - told, "waiting": waiting}
        found.append({"table": "one of 2 ranks fails", "what": what, **row})
    return found
