"""What can go wrong, one class a cause. Plain bad arguments stay :class:`ValueError` and :class:`TypeError`."""

__all__ = [
    "AttributionError",
    "BatchDependenceError",
    "CorruptedStoreError",
    "DivergenceError",
    "IncompleteFeaturesError",
    "MemoryBudgetError",
    "MissingDependencyError",
    "NegativeCurvatureError",
    "NonFiniteGradientError",
    "StoreMismatchError",
    "UnsupportedLayerError",
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


class IncompleteFeaturesError(AttributionError):
    """Scores were asked for while some training rows have no features yet."""


class CorruptedStoreError(AttributionError):
    """A file of the store is missing, truncated, or not what its checksum says."""


class UnsupportedLayerError(AttributionError):
    """A layer is in a state in which per-sample gradients do not exist, such as BatchNorm in train mode."""


class BatchDependenceError(AttributionError):
    """The model output of a sample changes with the samples beside it in the batch."""


class NonFiniteGradientError(AttributionError):
    """A per-sample gradient holds NaN or Inf; the message names the samples."""


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
