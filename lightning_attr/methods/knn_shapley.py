"""Shapley values of the training samples for a nearest-neighbour classifier on the representations."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_int
from lightning_attr.batches.running_sum import running_sum
from lightning_attr.features.snapshot_model import Batches, SnapshotModel
from lightning_attr.methods.base import ScoreBlock, SnapshotFeatures
from lightning_attr.methods.cache import CacheKey
from lightning_attr.methods.representation import representation
from lightning_attr.methods.support.layer_observation import (
    Observation,
    check_layer_name,
    class_labels,
    observed,
    refuse_target_function,
)
from lightning_attr.methods.support.module_method import ModelMethod, model_of
from lightning_attr.results.score_matrix import zeros

_DISTANCES = 2**22
"""Distances at once: 32 MiB."""


_NEIGHBOURS: CacheKey[_Labelled] = CacheKey("neighbours")
_OWN_VALUES: CacheKey[Tensor] = CacheKey("own values")


class KNNShapley(ModelMethod):
    r"""Exact Shapley values for a k-nearest-neighbour classifier on the representations (Jia et al., 2019).

    A set :math:`S` of training samples is worth :math:`v_j(S) = \tfrac1k \sum e_{ij}` to a target, over the
    :math:`\min(k, |S|)` samples of :math:`S` that are nearest to it in Euclidean distance, with :math:`e_{ij} = 1` if
    sample :math:`i` has the label of target :math:`j`, else 0. The score is the sample's Shapley value; over the
    samples they add up to :math:`v_j` of all. Positive scores help to classify the target, in units of that accuracy.

    Self-influence is a sample's value for classifying itself, with itself in the training set: it costs as much as
    attributing all training samples as targets. Samples with a label unlike those of their neighbours have high values.

    Every process holds the representations of all training samples in float64, and the scores of its own for some
    targets at a time.

    Args:
        k: neighbours that vote.
        layer: name of the layer whose output is the representation; None for the input of the last ``nn.Linear`` that
            the forward pass calls. Values ``(b, t, d)`` of sequences are averaged over the positions.
        snapshots: "last" for the last snapshot, "all" for all of them, each with an equal part.

    Raises:
        ValueError: if ``k`` is not positive.

    Example:
        >>> from torch import nn
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, nn.Linear): ...
        >>> train = (torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 1, 0]))
        >>> model = SnapshotModel.of(Classifier(1, 2).eval(), [train], [(torch.zeros(1, 1), torch.tensor([0]))])
        >>> (block,) = KNNShapley(k=1).score([SnapshotFeatures.at(model, {})])
        >>> block.scores.flatten()  # the middle one gets in the way of the last
        tensor([ 0.8333, -0.1667,  0.3333])
    """

    scale = "rank_only"

    def __init__(self, k: int = 10, layer: str | None = None, snapshots: str = "last") -> None:
        super().__init__(snapshots)
        self.k = check_int(self, "k", k, minimum=1)
        self.layer = check_layer_name(self, layer)

    def score_snapshot(self, snapshot: SnapshotFeatures) -> Iterator[ScoreBlock]:
        """Sort the training samples by their distance to each target; see :meth:`ModelMethod.score_snapshot`.

        Args:
            snapshot: with its model.

        Yields:
            Blocks of rows.

        Raises:
            AttributionError: if a function of the targets is to be measured.
            ValueError: if training samples or targets have no class labels.
        """
        model = model_of(snapshot)
        refuse_target_function(model, "KNNShapley")
        train = snapshot.cache.once(_NEIGHBOURS, lambda: self._gather(model))
        own_values = snapshot.cache.once(_OWN_VALUES, lambda: self._self_influence(model, train))
        self_influence = own_values.to(model.dtype)
        own = [row for rows in train.blocks for row in rows]
        with tempfile.TemporaryDirectory(prefix="lightning_attr-") as folder:
            values = zeros(len(own), len(snapshot.target_rows), lambda: Path(folder), model.dtype)
            start = 0
            for _, columns in self._labelled(model, model.target_batches(snapshot.target_rows)):
                for part in self._values(train, columns["representations"], columns["labels"]):
                    values[:, start : start + len(part)] = part[:, own].T
                    start += len(part)
            start = 0
            for rows in train.blocks:
                yield ScoreBlock(rows, values[start : start + len(rows)], self_influence[rows.start : rows.stop])
                start += len(rows)

    def _labelled(self, model: SnapshotModel, batches: Batches) -> Iterator[tuple[range, dict[str, Tensor]]]:
        def columns(seen: Observation) -> dict[str, Tensor]:
            h = representation(seen, self.layer)
            labels = class_labels(seen.targets, len(h))
            if labels is None:
                raise ValueError(
                    "KNNShapley compares the labels of neighbours, but the attribution step of "
                    f"{type(model.module).__name__} gives no class labels of shape ({len(h)},). Put "
                    "lightning_attr.AttributionMixin among its bases and return them from `attribution_step`, or use "
                    "RepresentationSimilarity."
                )
            return {"representations": h.double(), "labels": labels}

        for rows, found in observed(model, batches, columns, self.layer):
            yield range(rows[0], rows[-1] + 1), found

    def _gather(self, model: SnapshotModel) -> _Labelled:
        blocks = list(self._labelled(model, model.train_batches()))
        # A process without samples learns from the others how wide a representation is.
        width = torch.tensor([len(blocks), sum(columns["representations"].shape[1] for _, columns in blocks)])
        count, total = model.reduce(width).tolist()
        h = torch.zeros(model.n_train, total // count, dtype=torch.float64, device=model.device)
        labels = torch.zeros(model.n_train, dtype=torch.int64, device=model.device)
        for rows, columns in blocks:
            h[rows.start : rows.stop], labels[rows.start : rows.stop] = columns["representations"], columns["labels"]
        return _Labelled([rows for rows, _ in blocks], model.reduce(h), model.reduce(labels))

    def _self_influence(self, model: SnapshotModel, train: _Labelled) -> Tensor:
        """Value of each sample for itself, ``(n_train,)``, float64 on the CPU."""

        def compute() -> dict[str, Tensor]:
            own = torch.zeros(model.n_train, dtype=torch.float64)
            for rows in train.blocks:
                part = slice(rows.start, rows.stop)
                values = torch.cat(list(self._values(train, train.representations[part], train.labels[part])))
                own[part] = values[:, part].diagonal()
            return {"self_influence": model.reduce(own)}

        shapes = {"self_influence": (model.n_train,)}
        return model.kept(f"knn-shapley-{self.layer}-k={self.k}", compute, shapes)["self_influence"]

    def _values(self, train: _Labelled, representations: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Shapley values ``(w, n_train)`` for a few targets at a time, float64 on the CPU."""
        few = max(1, _DISTANCES // len(train.labels))
        for h, y in zip(representations.split(few), labels.split(few), strict=True):
            # Not by inner products, whose rounding would break ties at random.
            distances = torch.cdist(h, train.representations, compute_mode="donot_use_mm_for_euclid_dist")
            yield shapley_values(distances, train.labels == y[:, None], self.k).cpu()


@dataclass(frozen=True)
class _Labelled:
    """All training samples; ``blocks`` are those of this process."""

    blocks: list[range]
    representations: Tensor
    labels: Tensor


def shapley_values(distances: Tensor, correct: Tensor, k: int) -> Tensor:
    r"""Compute the Shapley values of all training samples for targets, by the recursion of Jia et al. (2019).

    With the samples in the order of their distance, :math:`s_n = e_n \min(k, n) / (k n)` and :math:`s_r = s_{r+1} +
    (e_r - e_{r+1}) \min(k, r) / (k r)`.

    Shapes: distances (m, n), correct (m, n). Returns ``(m, n)``, float64.
    """
    n = distances.shape[1]
    order = distances.argsort(dim=1, stable=True)
    e = correct.gather(1, order).double()
    ranks = torch.arange(1, n + 1, dtype=torch.float64, device=e.device)
    weights = ranks.clamp(max=k) / (k * ranks)
    steps = torch.cat([e[:, :-1] - e[:, 1:], e[:, -1:]], 1) * weights
    ordered = running_sum(steps.flip(1)).flip(1)
    return torch.empty_like(ordered).scatter_(1, order, ordered)
