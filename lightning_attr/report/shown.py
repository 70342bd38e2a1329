"""What a report needs of a result: :class:`lightning_attr.AttributionResult` has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


def knows_self_influence(result: ShownResult) -> bool:
    """Say whether a result has self-influence: of methods that would take a target for each sample it is NaN.

    Returns False if it is NaN.
    """
    return not bool(result.self_influence.isnan().all())


class ShownScores(Protocol):
    """Scores, whole or only the strongest of each target."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of training samples and targets."""

    @property
    def depth(self) -> int:
        """Proponents and opponents that each target has at most."""

    @property
    def effective_proponents(self) -> float:
        """See :func:`lightning_attr.metrics.effective_proponents`."""

    @property
    def train_indices(self) -> Tensor:
        """``(n_train,)``, int64."""

    @property
    def target_indices(self) -> Tensor:
        """``(n_target,)``, int64."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """How the scores came about."""

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Indices and scores of the strongest proponents, each ``(n_target, k)``."""

    def bottomk(self, k: int) -> tuple[Tensor, Tensor]:
        """Indices and scores of the strongest opponents, each ``(n_target, k)``."""


class ShownResult(Protocol):
    """Scores, and what is known of each training sample."""

    @property
    def scores(self) -> ShownScores:
        """Of every training sample for every target."""

    @property
    def self_influence(self) -> Tensor:
        """``(n_train,)``, high values are suspicious."""

    @property
    def data_value(self) -> Tensor:
        """``(n_train,)``, high values help."""

    @property
    def loss(self) -> Tensor:
        """``(n_train,)``."""

    @property
    def labels(self) -> Tensor | None:
        """``(n_train,)``, int64."""

    @property
    def noise_mask(self) -> Tensor | None:
        """``(n_train,)``, bool."""

    @property
    def trained_on(self) -> Tensor | None:
        """``(n_train,)``, bool."""

    @property
    def exposure(self) -> Tensor | None:
        """``(n_train,)``, int64: how often each was trained on."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Figures by name."""
