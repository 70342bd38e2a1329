"""Going through a plan: one retraining after the other, in one process or several, until all are finished."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # comes with lightning, and ships no types

from lightning_attr.errors import AttributionError
from lightning_attr.evaluation.ground_truth import Records
from lightning_attr.evaluation.subsets import Retraining
from lightning_attr.files.claims import STALE_AFTER

log = logging.getLogger(__name__)

_PAUSE = 0.2
"""Seconds between two looks at what others have finished."""
_SILENCE = 30.0
"""Seconds of waiting after which it is said who is waited for."""


class Train(Protocol):
    """How one model is trained."""

    def __call__(
        self, retraining: Retraining, kept: Tensor, beat: Callable[[], None], checkpoint: Path | None
    ) -> tuple[Tensor, dict[str, object]]:
        """Train from scratch.

        Shapes: kept (n_train,). Returns the model output of each target, ``(n_target,)``, and details for the record.
        """


@runtime_checkable
class TrainGroups(Train, Protocol):
    """How models are trained that can be trained many at once; the rest is trained one at a time."""

    def train_groups(
        self, records: Records, keep_checkpoints: bool, show: Callable[[], None], stopped: Callable[[], bool]
    ) -> None:
        """Claim, train and write what can be trained at once."""


def fill(
    records: Records,
    train: Train,
    keep_checkpoints: bool = False,
    progress: bool = True,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Retrain what is not finished, and wait for what other processes are at."""
    records.sweep()
    waited = _Waiting(records)
    with _bar(records, progress) as show:
        if isinstance(train, TrainGroups):
            train.train_groups(records, keep_checkpoints, show, stopped)
        while not stopped() and (unfinished := records.unfinished()):
            if any(_retrain(records, one, train, keep_checkpoints, show, stopped) for one in unfinished):
                waited = _Waiting(records)
            else:
                show()
                waited.tell(unfinished)
                time.sleep(_PAUSE)
    records.sweep()


class _Waiting:
    """Says now and then who is waited for, while all that is left is with other processes."""

    def __init__(self, records: Records) -> None:
        self.records, self.next = records, time.monotonic() + _SILENCE

    def tell(self, unfinished: list[Retraining]) -> None:
        """Say so, if it is time to."""
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + _SILENCE
        owners = [(one, self.records.claims.owner(one.name)) for one in unfinished[:3]]
        named = "; ".join(f"{one} is with {owner}" for one, owner in owners if owner is not None)
        log.warning(
            "Waiting for %d retrainings that other processes have in %s: %s. One is taken over after %d s in silence.",
            len(unfinished),
            self.records.dirpath,
            named or "they come to an end",
            STALE_AFTER,
        )


def _retrain(
    records: Records,
    retraining: Retraining,
    train: Train,
    keep_checkpoint: bool,
    show: Callable[[], None],
    stopped: Callable[[], bool],
) -> bool:
    """Do a retraining, unless it is done or another process is at it; say whether anything was done."""
    if stopped() or records.path(retraining).exists():
        return False
    claim = records.claim(retraining)
    if claim is None:
        return False
    with claim:
        checkpoint = records.checkpoint_path(retraining) if keep_checkpoint else None
        start = time.perf_counter()
        outputs, details = train(retraining, records.plan.masks[retraining.subset], claim.beat, checkpoint)
        records.write(retraining, outputs, {**details, "seconds": f"{time.perf_counter() - start:.3f}"})
    show()
    return True


@contextmanager
def _bar(records: Records, progress: bool) -> Iterator[Callable[[], None]]:
    """Show how many are finished, those of other processes as well, and the time left."""
    total = len(records.plan)
    with tqdm(total=total, initial=total - len(records.unfinished()), desc="Retraining", disable=not progress) as bar:

        def show() -> None:
            if progress:
                bar.update(total - len(records.unfinished()) - bar.n)

        yield show
        show()


# Several processes -----------------------------------------------------------------------------------------------


def fill_in_processes(
    records: Records, make_train: Callable[[], Train], num_workers: int, keep_checkpoints: bool, progress: bool
) -> None:
    """Do as :func:`fill`, several at a time."""
    try:
        pickle.dumps(make_train)
    except Exception as error:  # whatever hooks of the user's objects raise
        raise AttributionError(
            f"With num_workers={num_workers}, new processes have to import the functions that make module, trainer and "
            f"datamodule, but they cannot be pickled ({error}). Define them at the top level of a file, without "
            "lambda; or leave num_workers=1 and start the same script several times: they share the directory."
        ) from error
    context = multiprocessing.get_context("spawn")  # a forked torch may wait for ever, and has no CUDA
    stop = context.Event()
    # The same number of threads: it changes the rounding of large sums.
    start = (stop, torch.get_num_threads())
    with _bar(records, progress) as show, ProcessPoolExecutor(num_workers, context, _start, start) as pool:
        pending = {pool.submit(_work, records.dirpath, make_train, keep_checkpoints) for _ in range(num_workers)}
        try:
            while pending:
                done, pending = wait(pending, timeout=_PAUSE, return_when=FIRST_EXCEPTION)
                show()
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise AttributionError(
                "A process that retrained was killed (for memory, perhaps), or could not start: a script needs "
                '`if __name__ == "__main__":` around its calls, as new processes import it. What is finished is kept: '
                "run again to go on."
            ) from error
        finally:
            stop.set()


_stop: Event | None = None


def _start(stop: Event, threads: int) -> None:
    global _stop
    _stop = stop
    torch.set_num_threads(threads)


def _work(dirpath: Path, make_train: Callable[[], Train], keep_checkpoints: bool) -> None:
    fill(Records(dirpath), make_train(), keep_checkpoints, progress=False, stopped=_stopped)


def _stopped() -> bool:
    parent = multiprocessing.parent_process()
    return (_stop is not None and _stop.is_set()) or (parent is not None and not parent.is_alive())
