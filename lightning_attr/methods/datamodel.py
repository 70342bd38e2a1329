"""Scores from models that were retrained on many subsets: no gradients, and no run of the module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_choice, check_float, check_numbers, check_tensor
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.methods.base import AttributionMethod, ScoreBlock, SnapshotFeatures, compute_precision
from lightning_attr.methods.support.layer_observation import refuse_target_function
from lightning_attr.methods.support.penalised import Lasso, Ridge
from lightning_attr.methods.support.subset_truth import mask_digests
from lightning_attr.randomness.streams import random_words

T = TypeVar("T")

_BLOCK = 2**24
"""Weights that are computed, and scores that are given, at once."""
_GRIDS = {"lasso": torch.logspace(0, -3, 16).tolist(), "ridge": torch.logspace(-3, 3, 13).tolist()}
_LEAST_MASKS = 20
"""A tenth of them chooses the strength."""


class RetrainedOutputs(Protocol):
    """What :class:`lightning_attr.evaluation.GroundTruth` holds of retrained models.

    Example:
        >>> from types import SimpleNamespace
        >>> truth = SimpleNamespace(masks=torch.eye(2), outputs=torch.tensor([[1.0], [3.0]]), provenance={})
        >>> EmpiricalInfluence(truth).weights
        tensor([[-2.],
                [ 2.]], dtype=torch.float64)
    """

    @property
    def masks(self) -> Tensor:
        """Training samples of each subset, ``(num_subsets, n_train)``, bool."""

    @property
    def outputs(self) -> Tensor:
        """Model output of each target after retraining, ``(seeds, num_subsets, n_target)``."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Hashes of the data, ``train_data`` and ``target_probe``, as far as they are known."""


class RetrainingMethod(AttributionMethod):
    r"""A method whose scores come from retrained models alone.

    Its scores must not be compared with the models that they come from: their provenance names the subsets
    (``fitted_on``), and :func:`lightning_attr.evaluation.evaluate` refuses a ground truth that has one of them.

    Self-influence is the score of a sample for itself where the targets are the training samples. Elsewhere it is not
    known, as no retrained model was asked about the sample; in its place stands the **root mean square of the sample's
    scores** over all targets, which says how much leaving it out matters, not whether it helps itself.

    Args:
        truth: retrained models, as :func:`lightning_attr.evaluation.retrain_lds` returns them or
            ``GroundTruth.open(dirpath)`` reads them, or a pair of tensors: masks ``(m, n_train)``, bool or 0/1, and
            outputs ``(m, n_target)`` or ``(seeds, m, n_target)``, of which the mean over the seeds counts.

    Raises:
        AttributionError: if a retraining is not finished.
        TypeError: if ``truth`` is neither.
        ValueError: if masks and outputs do not fit, or a sample is in every subset or in none.

    Example:
        >>> masks, outputs = torch.tensor([[1, 0], [0, 1]]), torch.tensor([[1.0], [3.0]])
        >>> issubclass(EmpiricalInfluence, RetrainingMethod), EmpiricalInfluence((masks, outputs)).masks.dtype
        (True, torch.bool)
    """

    def __init__(self, truth: RetrainedOutputs | tuple[Tensor, Tensor]) -> None:
        self.projector = None
        self.masks, self.outputs, self.provenance = _read(truth)

    @property
    @abstractmethod
    def weights(self) -> Tensor:
        """Scores of all training samples for all targets, ``(n_train, n_target)``, float64."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What :attr:`config` says beside the subsets."""
        return {}

    @property
    def evidence(self) -> dict[str, Any]:
        """What was found out while fitting, for the record of a result."""
        return {}

    def select(self, snapshots: Sequence[T]) -> Sequence[T]:
        """Take the last one, of which nothing matters but the data.

        Args:
            snapshots: all that a run has.

        Returns:
            The last.
        """
        return snapshots[-1:]

    def prepare(self, snapshots: Sequence[SnapshotFeatures]) -> None:
        """Check that the data are those of the retrained models, and fit; see :meth:`AttributionMethod.prepare`.

        Args:
            snapshots: with all targets.

        Raises:
            AttributionError: if a function of the targets is to be measured.
            StoreMismatchError: if the data differ.
        """
        snapshot = snapshots[-1]
        self._check(snapshot, len(snapshot.targets["features"]))
        assert self.weights is not None
        snapshot.evidence.update(self.evidence)

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Give the weights; see :meth:`AttributionMethod.score`.

        Args:
            snapshots: the last one counts.

        Yields:
            Scores, block after block; only from the process that writes.
        """
        snapshot = snapshots[-1]
        if snapshot.model is not None and not snapshot.model.writer:
            return
        dtype = compute_precision(snapshot.targets["features"]).dtype
        self_influence = self._self_influence(snapshot).to(dtype)
        columns = self.weights[:, snapshot.target_rows.start : snapshot.target_rows.stop : snapshot.target_rows.step]
        n = len(columns)
        size = max(1, _BLOCK // max(1, columns.shape[1]))
        for start in range(0, n, size):
            rows = range(start, min(start + size, n))
            part = slice(rows.start, rows.stop)
            yield ScoreBlock(rows, columns[part].to(dtype), self_influence[part])

    def _self_influence(self, snapshot: SnapshotFeatures) -> Tensor:
        model = snapshot.model
        if model is not None and model.train_digest is not None and model.train_digest == model.target_digest:
            return self.weights.diagonal()
        return self.weights.square().mean(1).sqrt()

    def _check(self, snapshot: SnapshotFeatures, n_target: int) -> None:
        if snapshot.model is not None:
            refuse_target_function(snapshot.model, type(self).__name__)
        wrong = []
        sizes = {
            "training samples": (self.masks.shape[1], snapshot.n_train),
            "targets": (self.outputs.shape[1], n_target),
        }
        for name, (found, expected) in sizes.items():
            if expected and found != expected:
                wrong.append(f"the truth has {found:,} {name}, here are {expected:,}")
        if not wrong and snapshot.model is not None:
            digests = {"train_data": snapshot.model.train_digest, "target_probe": snapshot.model.target_digest}
            for key, own in digests.items():
                found_digest = self.provenance.get(key)
                if own is not None and found_digest is not None and own != found_digest:
                    name = "training samples" if key == "train_data" else "targets"
                    wrong.append(f"its {name} differ from those here, though there are as many")
        if wrong:
            raise StoreMismatchError(
                f"Expected argument `truth` of {type(self).__name__} to be of the data that are attributed, but "
                f"{', and '.join(wrong)}. Attribute with the datamodule and `targets` that the models were retrained "
                "with; a random split needs a fixed seed."
            )

    @property
    def config(self) -> dict[str, Any]:
        """Name and arguments, and the digests of the masks, ``fitted_on``."""
        own = {"method": type(self).__name__, "scale": self.scale, **self.arguments, "projector": None}
        return {**own, "fitted_on": mask_digests(self.masks)}


class EmpiricalInfluence(RetrainingMethod):
    r"""Mean output with a sample less the mean output without it, over retrained models (Feldman and Zhang, 2020).

    .. math::
        \tau_{ij} = \operatorname{mean}_{k: i \in S_k} y_{kj} - \operatorname{mean}_{k: i \notin S_k} y_{kj}

    Unbiased and noisy: the variance of a score is about that of the outputs over :math:`m \alpha (1 - \alpha)` for
    :math:`m` subsets with a share :math:`\alpha` of the samples. It takes thousands of models.

    Args:
        truth: as for :class:`RetrainingMethod`, which also says what self-influence is.

    Raises:
        AttributionError: see :class:`RetrainingMethod`.

    Example:
        >>> masks, outputs = torch.tensor([[1, 0], [0, 1]]), torch.tensor([[1.0], [3.0]])
        >>> snapshot = SnapshotFeatures.of({"features": torch.ones(2, 0)}, {"features": torch.ones(1, 0)})
        >>> [block.scores.flatten() for block in EmpiricalInfluence((masks, outputs)).score([snapshot])]
        [tensor([-2.,  2.])]
    """

    @cached_property
    def weights(self) -> Tensor:
        """Scores ``(n_train, n_target)``, float64."""
        masks = self.masks.T.double()
        inside = masks.sum(1, keepdim=True)
        total = masks @ self.outputs
        return total / inside - (self.outputs.sum(0) - total) / (len(self.masks) - inside)


class Datamodel(RetrainingMethod):
    r"""Linear regression of retrained models' outputs on their training samples (Ilyas et al., 2022).

    One regression with intercept a target, :math:`y_k \approx w_0 + \sum_{i \in S_k} w_i`: the scores are the weights.
    Fits are in float64; the lasso is solved by coordinate descent to a duality gap of 1e-10 of the variance.

    Where all subsets have the same size, their outputs say nothing about the sum of a target's weights: the penalty
    decides it.

    Args:
        truth: as for :class:`RetrainingMethod`, which also says what self-influence is.
        penalty: "lasso" for :math:`\lambda \|w\|_1` or "ridge" for :math:`\tfrac{\lambda}{2} \|w\|^2`, beside half
            of the mean squared error.
        strength: :math:`\lambda`; for the lasso a share of the smallest that leaves no weight, in (0, 1], for the ridge
            a multiple of the mean diagonal entry of the masks' covariance, 0 for the least squares of least norm.
            "auto" chooses it for each target: by the squared error on a tenth of the subsets, which are then fitted
            with the others. What that found is in the provenance of the result.

    Raises:
        ValueError: if ``penalty`` or ``strength`` is not one of these, or "auto" has fewer than 20 subsets; and see
            :class:`RetrainingMethod`.

    Example:
        >>> masks = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
        >>> Datamodel((masks, masks @ torch.tensor([[2.0], [-1.0]])), penalty="ridge", strength=0.0).weights
        tensor([[ 2.0000],
                [-1.0000]], dtype=torch.float64)
    """

    def __init__(
        self,
        truth: RetrainedOutputs | tuple[Tensor, Tensor],
        penalty: str = "lasso",
        strength: float | str = "auto",
    ) -> None:
        super().__init__(truth)
        check_choice(self, "penalty", penalty, _GRIDS)
        if strength == "auto":
            if len(self.masks) < _LEAST_MASKS:
                raise ValueError(
                    f"Expected argument `truth` to hold at least {_LEAST_MASKS} subsets to choose the strength with, "
                    f"but it has {len(self.masks)}. Retrain on more, or pass a number as `strength`."
                )
        elif penalty == "lasso":
            strength = check_float(self, "strength", strength, above=0, maximum=1, also="'auto'")
        else:
            strength = check_float(self, "strength", strength, minimum=0, also="'auto'")
        self.penalty = penalty
        self.strength = strength

    @property
    def weights(self) -> Tensor:
        """Scores ``(n_train, n_target)``, float64."""
        return self.fit.weights

    @property
    def arguments(self) -> dict[str, Any]:
        """Penalty and strength."""
        return {"penalty": self.penalty, "strength": self.strength}

    @property
    def evidence(self) -> dict[str, Any]:
        """The strengths that were tried, how many targets chose each, and the held-out share of variance explained."""
        return {} if self.fit.choice is None else {"strength_choice": self.fit.choice}

    @cached_property
    def fit(self) -> DatamodelFit:
        """Weights, strengths and why."""
        if not isinstance(self.strength, str):
            strengths, choice = torch.full((self.outputs.shape[1],), self.strength, dtype=torch.float64), None
        else:
            strengths, choice = self._choose()
        solver = self._solver(self.masks)
        parts = self._parts(self.outputs - self.outputs.mean(0), 1)
        fitted = [solver.solve(y, strengths[part]) for part, y in parts]
        return DatamodelFit(torch.cat(fitted, 1), strengths, choice)

    def _solver(self, masks: Tensor) -> Lasso | Ridge:
        inputs = masks.double()
        inputs -= inputs.mean(0)
        return (Lasso if self.penalty == "lasso" else Ridge)(inputs)

    def _parts(self, outputs: Tensor, copies: int) -> Iterator[tuple[slice, Tensor]]:
        """Outputs of some targets at a time, so many that their weights fit into memory."""
        size = max(1, _BLOCK // (self.masks.shape[1] * copies))
        for start in range(0, outputs.shape[1], size):
            part = slice(start, start + size)
            yield part, outputs[:, part]

    def _choose(self) -> tuple[Tensor, dict[str, Any]]:
        """Strength of each target, ``(n_target,)``, and the evidence."""
        grid = torch.tensor(_GRIDS[self.penalty], dtype=torch.float64)
        m = len(self.masks)
        order = torch.from_numpy(np.argsort(random_words(m, "datamodel hold-out"), kind="stable"))
        held, used = order[: m // 10], order[m // 10 :]
        masks, means = self.masks[used], self.outputs[used].mean(0)
        unseen = self.masks[held].double() - masks.double().mean(0)
        solver = self._solver(masks)
        errors = []
        for part, outputs in self._parts(self.outputs, len(grid)):
            weights = solver.path(outputs[used] - means[part], grid)
            predicted = (unseen @ weights.flatten(1)).view(len(held), -1, len(grid))
            wrong = predicted - (outputs[held] - means[part])[:, :, None]
            errors.append(wrong.square().mean(0))
        error = torch.cat(errors)  # (n_target, grid)
        least, best = error.min(1)
        variance = (self.outputs[held] - means).square().mean(0).sum()
        choice = {
            "strengths": grid.tolist(),
            "targets": best.bincount(minlength=len(grid)).tolist(),
            "held_out_subsets": len(held),
            "held_out_r2": float(1 - least.sum() / variance) if variance > 0 else 0.0,
        }
        return grid[best], choice


@dataclass(frozen=True)
class DatamodelFit:
    """Regressions of all targets.

    Args:
        weights: ``(n_train, n_target)``, float64.
        strengths: of the penalties, ``(n_target,)``.
        choice: how they were chosen, as plain values; None where they were given.

    Example:
        >>> DatamodelFit(torch.zeros(3, 2), torch.ones(2), None).choice is None
        True
    """

    weights: Tensor
    strengths: Tensor
    choice: dict[str, Any] | None


def _read(truth: Any) -> tuple[Tensor, Tensor, Mapping[str, Any]]:
    """Masks ``(m, n)``, bool, outputs ``(m, q)``, float64, and provenance."""
    provenance: Mapping[str, Any] = {}
    if isinstance(truth, (tuple, list)) and len(truth) == 2:
        masks, outputs = truth
    elif hasattr(truth, "masks") and hasattr(truth, "outputs"):
        masks, outputs, provenance = truth.masks, truth.outputs, getattr(truth, "provenance", {})
    else:
        raise TypeError(
            "Expected argument `truth` to be a GroundTruth, or a pair of tensors (masks, outputs), but got "
            f"{type(truth).__name__}. Open a directory with `GroundTruth.open(dirpath)`."
        )
    pair = (("truth[0]", masks, "masks (m, n_train)"), ("truth[1]", outputs, "outputs (m, n_target)"))
    masks, outputs = (check_numbers(None, *part) for part in pair)
    for name, values in (("truth[0]", masks), ("truth[1]", outputs)):
        check_tensor(None, name, values)
    masks, outputs = masks.cpu(), outputs.cpu().double()
    if masks.ndim != 2 or outputs.ndim not in {2, 3} or outputs.shape[-2] != len(masks) or outputs.numel() == 0:
        raise ValueError(
            "Expected argument `truth` to hold masks (m, n_train) and outputs (m, n_target) or (seeds, m, n_target), "
            f"but got {tuple(masks.shape)} and {tuple(outputs.shape)}."
        )
    if not ((masks == 0) | (masks == 1)).all():
        raise ValueError("Expected the masks of argument `truth` to hold only True and False (or 0 and 1).")
    if not outputs.isfinite().all():
        raise AttributionError(
            "Expected argument `truth` to hold the finite outputs of finished retrainings, but some are NaN or Inf. "
            "Run the same `retrain_lds` call again, or pass the finished subsets as a pair of tensors."
        )
    masks = masks.bool()
    same = (masks == masks[0]).all(0)
    if same.any():
        samples = same.nonzero().flatten().tolist()
        raise ValueError(
            f"Expected every training sample to be in some subsets of argument `truth` and not in others, but "
            f"{len(samples)} are in all or in none, among them sample {samples[0]}: retraining says nothing about them."
        )
    return masks, outputs.reshape(-1, *outputs.shape[-2:]).mean(0), provenance
