"""Errors of the user's own code while samples are read: they name the samples, here and in a DataLoader's workers."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch.utils.data import Subset, get_worker_info

from lightning_attr.errors import AttributionError, SampleReadError


def refuse_samples(dataset: Any, rows: Sequence[int], error: Exception, what: str = "") -> NoReturn:
    """Say which samples could not be read, and why.

    Example:
        >>> refuse_samples([1.0], [3], IndexError("list index out of range"))
        Traceback (most recent call last):
        ...
        lightning_attr.errors.SampleReadError: dataset[3] of list could not be read: IndexError: list index out ...
    """
    where = _samples(dataset, rows)
    if what:
        raise SampleReadError(f"{what} failed for {where}: {_cause(error)}.") from error
    raise SampleReadError(f"{where} could not be read: {_cause(error)}.") from error


def first_failure(read: Callable[[int], object], count: int) -> tuple[int, Exception] | None:
    """Find which of some samples fails alone.

    Returns its position, and what it raises; None if none does.

    Example:
        >>> first_failure([1.0, 2.0].__getitem__, 3)
        (2, IndexError('list index out of range'))
    """
    found = ((position, failure_of(read, position)) for position in range(count))
    return next(((position, error) for position, error in found if error is not None), None)


def failure_of(call: Callable[[int], object], position: int) -> Exception | None:
    """Try one of some samples.

    Returns whatever the user's code raises, or None.

    Example:
        >>> failure_of([1.0].__getitem__, 0), failure_of([1.0].__getitem__, 1)
        (None, IndexError('list index out of range'))
    """
    try:
        call(position)
    except Exception as error:
        return error
    return None


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(" .\n:")


def _samples(dataset: Any, rows: Sequence[int]) -> str:
    """Name rows, and of a subset's only row the sample behind it."""
    of = type(dataset).__name__
    if len(rows) == 1 and type(dataset) is Subset and 0 <= rows[0] < len(dataset.indices):
        return f"dataset[{rows[0]}] of Subset (which is {_samples(dataset.dataset, [int(dataset.indices[rows[0]])])})"
    shown = ", ".join(f"dataset[{row}]" for row in rows[:4])
    more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
    return f"{shown}{more} of {of}"


def read_sample(dataset: Any, row: int) -> Any:
    """Read a sample.

    Example:
        >>> read_sample([3.0, 4.0], 1)
        4.0
    """
    try:
        return dataset[row]
    except Exception as error:
        refuse_samples(dataset, [row], error)


def collated(collate_fn: Callable[[Any], Any], samples: Any, rows: Sequence[int], dataset: Any, reading: str) -> Any:
    """Call the user's collate function; where it fails, say for which samples: for one alone, if it does."""
    try:
        return collate_fn(samples[0] if reading == "items" else samples)
    except Exception as error:
        what = f"`collate_fn` ({getattr(collate_fn, '__qualname__', type(collate_fn).__qualname__)})"
        alone = len(rows) if reading == "rows" and len(rows) > 1 else 0
        failure = first_failure(lambda position: collate_fn([samples[position]]), alone)
        if failure is not None:
            refuse_samples(dataset, [rows[failure[0]]], failure[1], what)
        refuse_samples(dataset, rows, error, what)


def stream_samples(dataset: Any, role: str) -> Iterator[Any]:
    """Go through an iterable-style data set."""
    number = 0
    try:
        samples = iter(dataset)
        while True:
            try:
                sample = next(samples)
            except StopIteration:
                return
            yield sample
            number += 1
    except Exception as error:
        raise SampleReadError(
            f"Sample {number} of {type(dataset).__name__}, the stream of {role} data, could not be read: "
            f"{_cause(error)}. It would be dataset[{number}]."
        ) from error


# Workers ------------------------------------------------------------------------------------------------------------


class _WorkerTracebackError(Exception):
    """Where in a worker an error was raised: its own traceback does not travel."""

    def __str__(self) -> str:
        return f"in a DataLoader worker:\n{self.args[0]}"


@dataclass(frozen=True)
class _FailedBatch:
    """What a worker sends in the place of a batch that it could not make.

    Args:
        message: of the error.
        cause: what the user's code raised.
        trace: where.
    """

    message: str
    cause: Exception
    trace: str


def failed_batch(error: Exception) -> _FailedBatch:
    """Pack an error for the way to the main process; outside of a worker it is raised again.

    Returns what to send. A cause that cannot be pickled is told by a RuntimeError.
    """
    if get_worker_info() is None:
        raise error
    known = isinstance(error, SampleReadError)
    cause = error.__cause__ if known and isinstance(error.__cause__, Exception) else error
    trace = "".join(traceback.format_exception(type(cause), cause, cause.__traceback__))
    try:
        cause = pickle.loads(pickle.dumps(cause))
    except Exception:  # whatever its own hooks raise
        cause = RuntimeError(f"{type(cause).__name__}: {cause}")
    return _FailedBatch(str(error) if known else "", cause, trace)


def named_batches(
    found: Iterator[Any], dataset: Any, batches: Sequence[Sequence[int]], role: str, workers: int
) -> Iterator[Any]:
    """Go through what a loader gives, and name the samples of a batch that never comes."""
    for rows in batches:
        try:
            batch = next(found)
        except StopIteration:
            return
        except AttributionError:  # which names them
            raise
        except Exception as error:
            if not workers:
                refuse_samples(dataset, rows, error)
            raise SampleReadError(
                f"The {role} DataLoader failed while {_samples(dataset, rows)}, or what follows, was read: "
                f"{_cause(error)}."
            ) from error
        if isinstance(batch, _FailedBatch):
            batch.cause.__cause__ = _WorkerTracebackError(batch.trace)
            if not batch.message:
                refuse_samples(dataset, rows, batch.cause)
            raise SampleReadError(batch.message) from batch.cause
        yield batch
