"""Soft-thresholding: small scores are noise, and are set to zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_float, check_instance, check_int
from lightning_attr.methods.base import AttributionMethod, ScoreBlock, SnapshotFeatures, check_method, compute_precision
from lightning_attr.methods.support.subset_truth import SubsetTruth, check_subset_truth, mask_digests
from lightning_attr.metrics.correlation import correlation_score
from lightning_attr.metrics.datamodeling import subset_sums
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.optimizer_state import OptimizerState
from lightning_attr.projectors import Projection
from lightning_attr.results.score_matrix import ScoreMatrix

T = TypeVar("T")

_COLUMNS = 256
"""Targets at once while thresholds are chosen."""


def soft_threshold(
    scores: ScoreMatrix,
    threshold: float | Tensor | None = None,
    *,
    keep: int | None = None,
    truth: SubsetTruth | None = None,
) -> ScoreMatrix:
    r"""Move all scores towards zero, and keep those that do not reach it (Park et al., 2023).

    .. math::
        \tau_{ij} \mapsto \operatorname{sign}(\tau_{ij}) \max(|\tau_{ij}| - t_j, 0)

    Args:
        scores: of all training samples.
        threshold: :math:`t`, for all targets or ``(n_target,)``, in units of the scores; 0 changes nothing.
        keep: instead, for each target the threshold that leaves so many scores.
        truth: instead, for each target the threshold with the best rank correlation of summed scores with retrained
            models, of those that leave all scores, a half, a quarter, and so on. The result says which subsets these
            were: they are not for reporting.

    Returns:
        The scores, in memory; ``provenance`` has the thresholds, and with ``truth`` the digests of its masks,
        ``fitted_on``.

    Raises:
        AttributionError: if the truth is not finished.
        StoreMismatchError: if it is of other data.
        ValueError: if not exactly one of the three is given, or one is out of range.

    Example:
        >>> scores = ScoreMatrix(torch.tensor([[3.0, 1.0], [-2.0, 4.0], [0.5, -8.0]]))
        >>> soft_threshold(scores, 1.0).values
        tensor([[ 2.,  0.],
                [-1.,  3.],
                [ 0., -7.]])
        >>> soft_threshold(scores, keep=1).provenance["soft_threshold"]
        [2.0, 4.0]
    """
    check_instance("soft_threshold", "scores", scores, ScoreMatrix, "a ScoreMatrix")
    _check("soft_threshold", threshold, keep, truth, scores.shape)
    chosen = threshold
    provenance: dict[str, Any] = dict(scores.provenance)
    if keep is not None or truth is not None:
        fitting = None
        if truth is not None:
            fitting = truth.masks[:, scores.train_indices], truth.outputs[..., scores.target_indices]
            provenance["fitted_on"] = [*provenance.get("fitted_on", ()), *mask_digests(truth.masks)]
        chosen = _thresholds(scores.values, keep, fitting)
    provenance["soft_threshold"] = chosen.tolist() if isinstance(chosen, Tensor) else chosen
    assert chosen is not None
    return replace(scores, values=_shrunk(scores.values, chosen), provenance=provenance)


class SoftThreshold(AttributionMethod):
    """Scores of another method, soft-thresholded; see :func:`soft_threshold`.

    A given threshold takes part block by block. For a chosen one, the scores of all training samples for the targets
    at hand are held in memory.

    Args:
        method: what scores.
        threshold: for all targets, in units of the scores.
        keep: instead, how many scores each target keeps.
        truth: instead, models retrained on at least 20 subsets to choose each target's threshold by. An evaluation
            refuses these subsets.

    Raises:
        AttributionError: if the truth is not finished.
        ValueError: if not exactly one of the three is given, or one is out of range.

    Example:
        >>> from lightning_attr.methods import GradDot
        >>> train = {"features": torch.tensor([[1.0], [2.0], [-3.0]]), "out_to_loss": torch.ones(3)}
        >>> snapshot = SnapshotFeatures.of(train, {"features": torch.ones(1, 1)})
        >>> [block.scores.flatten() for block in SoftThreshold(GradDot(), keep=1).score([snapshot])]
        [tensor([ 0.,  0., -1.])]
    """

    def __init__(
        self,
        method: AttributionMethod,
        threshold: float | None = None,
        *,
        keep: int | None = None,
        truth: SubsetTruth | None = None,
    ) -> None:
        check_method(self, method)
        _check(self, threshold, keep, truth, None)
        self.method = method
        self.projector = method.projector
        self.scale = method.scale
        self.threshold = threshold
        self.keep = keep
        self.truth = truth

    def second_directions(self, curvature: str) -> int:
        """Ask the method; see :meth:`AttributionMethod.second_directions`.

        Args:
            curvature: as there.

        Returns:
            How many.
        """
        return self.method.second_directions(curvature)

    def bind(self, layout: ParameterLayout, snapshot: str) -> Projection:
        """Draw the projection of the method; see :meth:`AttributionMethod.bind`.

        Args:
            layout: the parameters.
            snapshot: key of the projection.

        Returns:
            The projection.
        """
        return self.method.bind(layout, snapshot)

    @property
    def needs_optimizer_state(self) -> bool:
        """Whether the method does."""
        return self.method.needs_optimizer_state

    def precondition(self, projection: Projection, layout: ParameterLayout, state: OptimizerState) -> Projection:
        """Let the method see the optimizer's state; see :meth:`AttributionMethod.precondition`.

        Args:
            projection: from :meth:`bind`.
            layout: the parameters.
            state: the optimizer's.

        Returns:
            The map of the training samples.
        """
        return self.method.precondition(projection, layout, state)

    def bind_targets(self, projection: Projection) -> Projection:
        """Choose the method's map of the targets; see :meth:`AttributionMethod.bind_targets`.

        Args:
            projection: of the training samples.

        Returns:
            That of the targets.
        """
        return self.method.bind_targets(projection)

    @property
    def projector_config(self) -> dict[str, Any] | None:
        """That of the method."""
        return self.method.projector_config

    def select(self, snapshots: Sequence[T]) -> Sequence[T]:
        """Choose the snapshots of the method; see :meth:`AttributionMethod.select`.

        Args:
            snapshots: all that a run has.

        Returns:
            Those it uses.
        """
        return self.method.select(snapshots)

    def prepare(self, snapshots: Sequence[SnapshotFeatures]) -> None:
        """Let the method prepare, and check that the truth is of these targets; see :meth:`AttributionMethod.prepare`.

        Args:
            snapshots: with all targets.

        Raises:
            StoreMismatchError: if it is not.
        """
        if self.truth is not None:
            check_subset_truth(self, self.truth, snapshots[0].n_train or None, len(snapshots[0].targets["features"]))
        if self.threshold is None:
            snapshots[0].evidence["soft_threshold"] = []
        self.method.prepare(snapshots)

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Shrink the scores of the method; see :meth:`AttributionMethod.score`.

        Self-influence is the score of a sample as its own target, so that a threshold for all targets applies to it;
        with one chosen for each target, it stays as it is.

        Args:
            snapshots: in the order of training.

        Yields:
            Scores, block after block.

        Raises:
            StoreMismatchError: if the truth is of other data.
        """
        blocks = self.method.score(snapshots)
        if not len(snapshots[0].targets["features"]):
            yield from blocks
        elif self.threshold is not None:
            for block in blocks:
                own = _shrunk(block.self_influence, self.threshold)
                yield ScoreBlock(block.rows, _shrunk(block.scores, self.threshold), own)
        else:
            held = list(blocks)
            thresholds = self._chosen(held, snapshots[0])
            for block in held:
                yield ScoreBlock(block.rows, _shrunk(block.scores, thresholds.to(block.scores)), block.self_influence)

    @property
    def config(self) -> dict[str, Any]:
        """Name and arguments, with those of the method, and the masks that were fitted on."""
        of = self.method.config
        config = {"method": type(self).__name__, "scale": self.scale, "threshold": self.threshold, "keep": self.keep}
        fitted_on = [*of.get("fitted_on", ()), *(mask_digests(self.truth.masks) if self.truth is not None else ())]
        return {**config, "of": of, **({"fitted_on": fitted_on} if fitted_on else {})}

    def _chosen(self, blocks: Sequence[ScoreBlock], snapshot: SnapshotFeatures) -> Tensor:
        """Thresholds from the scores of all processes, ``(m,)``."""
        dtype = snapshot.model.dtype if snapshot.model else compute_precision(snapshot.targets["features"]).dtype
        device = blocks[0].scores.device if blocks else snapshot.targets["features"].device
        fitting = None
        if self.truth is not None:
            fitting = self.truth.masks, self.truth.outputs[..., list(snapshot.target_rows)]
        values = torch.zeros(snapshot.n_train, len(snapshot.targets["features"]), dtype=dtype, device=device)
        for block in blocks:
            values[block.rows.start : block.rows.stop] = block.scores
        thresholds = _thresholds(snapshot.reduce(values), self.keep, fitting)
        snapshot.evidence.setdefault("soft_threshold", []).extend(thresholds.tolist())
        return thresholds


def _check(
    owner: object,
    threshold: float | Tensor | None,
    keep: int | None,
    truth: SubsetTruth | None,
    shape: tuple[int, int] | None,
) -> None:
    given = [name for name, v in {"threshold": threshold, "keep": keep, "truth": truth}.items() if v is not None]
    if len(given) != 1:
        raise ValueError(
            "Expected exactly one of the arguments `threshold`, `keep` and `truth`, but got "
            f"{' and '.join(f'`{name}`' for name in given) or 'none'}."
        )
    if isinstance(threshold, Tensor) and shape is not None and threshold.shape not in {(), (shape[1],)}:
        raise ValueError(
            f"Expected argument `threshold` to be a number or of the shape ({shape[1]},), one a target, but got "
            f"{tuple(threshold.shape)}."
        )
    if isinstance(threshold, Tensor) and shape is not None:
        if not ((threshold >= 0) & threshold.isfinite()).all():
            raise ValueError("Expected argument `threshold` to hold finite numbers >= 0, but some are not.")
    elif threshold is not None:
        check_float(owner, "threshold", threshold, minimum=0)
    if keep is not None:
        check_int(owner, "keep", keep, minimum=1)
    if truth is not None:
        check_subset_truth(owner, truth, *(shape or ()))


def _shrunk(values: Tensor, threshold: float | Tensor) -> Tensor:
    limit = torch.as_tensor(threshold, dtype=values.dtype, device=values.device)
    return values - torch.minimum(torch.maximum(values, -limit), limit)


def _thresholds(values: Tensor, keep: int | None, fitting: tuple[Tensor, Tensor] | None) -> Tensor:
    """Choose the threshold of each target, ``(m,)``, from its scores, ``(n, m)``."""
    parts = []
    for start in range(0, values.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        part = values[:, columns]
        if fitting is None:
            assert keep is not None
            parts.append(_leaving(part, [keep])[0])
        else:
            parts.append(_best(part, fitting[0], fitting[1][..., columns]))
    return torch.cat(parts) if parts else values.new_zeros(0)


def _leaving(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Thresholds that leave so many scores of each target, ``(len(counts), m)``."""
    sizes = values.abs().sort(dim=0, descending=True).values
    sizes = torch.cat([sizes, torch.zeros_like(sizes[:1])])  # all stay above zero
    return sizes[[min(count, len(values)) for count in counts]]


def _best(values: Tensor, masks: Tensor, outputs: Tensor) -> Tensor:
    """Threshold of the best rank correlation for each target, the lowest of equals, ``(m,)``."""
    counts = [len(values) >> halving for halving in range(len(values).bit_length())]
    candidates = _leaving(values, counts)
    masks, measured = masks.to(values.device), outputs.to(values.device, torch.float64)
    found = []
    for candidate in candidates:
        predicted, _ = subset_sums(_shrunk(values, candidate), masks)
        found.append(correlation_score(predicted, measured, "spearman", 0, 0.95, 0).per_target)
    best = torch.stack(found).nan_to_num(nan=-2.0).argmax(0)  # what is constant over the subsets has no correlation
    return candidates.gather(0, best[None])[0]
