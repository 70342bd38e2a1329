"""What can go wrong, one class per cause. Plain bad arguments stay :class:`ValueError` and :class:`TypeError`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = [
    "AttributionError",
    "BatchDependenceError",
    "BatchRowsError",
    "CorruptedStoreError",
    "DivergenceError",
    "IncompleteFeaturesError",
    "InvalidLabelError",
    "MemoryBudgetError",
    "MissingDependencyError",
    "NegativeCurvatureError",
    "NonFiniteGradientError",
    "SampleReadError",
    "SampleRunError",
    "StoreInUseError",
    "StoreMismatchError",
    "UnsupportedLayerError",
    "named_samples",
]


class AttributionError(RuntimeError):
    """Base class of every error that this package raises on purpose.

    Example:
        >>> from lightning_attr.errors import AttributionError, StoreMismatchError
        >>> issubclass(StoreMismatchError, AttributionError)
        True
    """


class StoreMismatchError(AttributionError):
    """A store was written for another model, data set, projection or run than the one at hand."""


class StoreInUseError(AttributionError):
    """Another process writes a store, which has one writer at a time; the message says which."""


class IncompleteFeaturesError(AttributionError):
    """Scores were asked for while some training rows have no features yet."""


class CorruptedStoreError(AttributionError):
    """A file of the store is missing, truncated, or not what its checksum says."""


class UnsupportedLayerError(AttributionError):
    """A layer is in a state in which per-sample gradients do not exist, such as BatchNorm in train mode."""


class BatchDependenceError(AttributionError):
    """The model output of a sample changes with the samples beside it in the batch."""


class BatchRowsError(AttributionError):
    """A batch does not hold the samples that were asked for; the message names what made it, and the samples."""


class SampleReadError(AttributionError):
    """A data set, its collate function or a worker raised; the message names the samples, the cause is their error."""


class SampleRunError(AttributionError):
    """The module's code raised for some samples and not for others; the message names them, the cause is its error."""


class NonFiniteGradientError(AttributionError):
    """A per-sample gradient holds NaN or Inf; the message names the samples.

    Args:
        message: what is wrong, and what to do.
        positions: where in their batch the samples are, where the message does not name them.
        batch_size: number of samples in it.
    """

    def __init__(self, message: str, positions: Sequence[int] = (), batch_size: int = 0) -> None:
        super().__init__(message)
        self.positions = positions
        self.batch_size = batch_size


class MemoryBudgetError(AttributionError):
    """The memory budget is too small for one sample; the message says how much it needs."""


class MissingDependencyError(AttributionError, ImportError):
    """An optional dependency is needed; the message names the extra that installs it."""


class NegativeCurvatureError(AttributionError):
    """A curvature that must be positive is not; the message names the directions and what to do.

    Args:
        message: what happened.
        rows: the right-hand sides that met it; empty where the curvature as a whole is meant.
    """

    def __init__(self, message: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.rows = rows

    def __reduce__(self) -> tuple[type, tuple[str, tuple[int, ...]]]:
        """Keep the rows where the error is pickled, as between processes."""
        return type(self), (str(self), self.rows)


class DivergenceError(AttributionError):
    """An iteration grows where it should settle; the message says which setting to change."""


class InvalidLabelError(AttributionError, ValueError):
    """Samples have no label that counts, or one that is no class; the message names them.

    Args:
        message: what is wrong, and what to do.
        positions: where in their batch the samples are.
        batch_size: number of samples in it.
    """

    def __init__(self, message: str, positions: Sequence[int] = (), batch_size: int = 0) -> None:
        super().__init__(message)
        self.positions = positions
        self.batch_size = batch_size


@contextmanager
def named_samples(rows: Sequence[int]) -> Iterator[None]:
    """Let errors that know samples by their positions in a batch name them in the data set.

    Args:
        rows: row numbers of the samples of the batch.

    Yields:
        Nothing.

    Raises:
        InvalidLabelError: if one is raised inside; of a batch of as many samples, with ``dataset[i]`` in its message.
        NonFiniteGradientError: likewise.

    Example:
        >>> with named_samples([7, 4, 9]):
        ...     raise InvalidLabelError("No label in the samples [2] of the batch.", [2], 3)
        Traceback (most recent call last):
        ...
        lightning_attr.errors.InvalidLabelError: No label in the samples [2] of the batch. Look at dataset[9].
    """
    try:
        yield
    except (InvalidLabelError, NonFiniteGradientError) as error:
        if not error.positions or error.batch_size != len(rows):  # a part of the batch, or what a module made of it
            raise
        named = ", ".join(f"dataset[{rows[position]}]" for position in error.positions[:8])
        more = f" and {len(error.positions) - 8} more" if len(error.positions) > 8 else ""
        raise type(error)(f"{error} Look at {named}{more}.", error.positions, len(rows)) from error
