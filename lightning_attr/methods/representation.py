"""Similarity of representations at a layer: no gradients, no counterfactual, a baseline."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_attr.arguments.checks import check_choice
from lightning_attr.methods.base import ScoreBlock, SnapshotFeatures
from lightning_attr.methods.support.layer_observation import (
    Observation,
    check_layer_name,
    observed,
    refuse_target_function,
)
from lightning_attr.methods.support.module_method import ModelMethod, model_of


class RepresentationSimilarity(ModelMethod):
    r"""Similarity of the representations of training sample and target (Hanawa et al., 2021, compare several).

    With the values :math:`h` of a layer, the score is :math:`h_i \cdot h_j`, their cosine, or :math:`-\|h_i - h_j\|^2`.
    It says which samples look alike to the model, not what leaving one out would do: only the order means something,
    and a sample of another label that looks alike scores as high.

    Self-influence is the score of a sample for itself: :math:`\|h_i\|^2`; for the cosine it is 1 and for the distance
    0, which tell nothing.

    Args:
        layer: name of the layer whose output is compared; None for the input of the last ``nn.Linear`` that the forward
            pass calls, the representation that a head reads.
        similarity: "dot", "cosine" or "l2".
        tokens: what to do with values ``(b, t, d)`` of sequences: "mean" over all positions (padded ones too), "last"
            position, or "flatten". Values of any other shape are flattened.
        snapshots: "last" for the last snapshot, "all" for all of them, each with an equal part.

    Raises:
        ValueError: if an argument is not one of these.

    Example:
        >>> from torch import nn
        >>> from lightning_attr import AttributionMixin
        >>> from lightning_attr.features.snapshot_model import SnapshotModel
        >>> class Classifier(AttributionMixin, nn.Linear): ...
        >>> train = (torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([0, 1]))
        >>> targets = (torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        >>> model = SnapshotModel.of(Classifier(2, 3).eval(), [train], [targets])
        >>> (block,) = RepresentationSimilarity(similarity="cosine").score([SnapshotFeatures.at(model, {})])
        >>> block.scores.flatten()
        tensor([1.0000, 0.6000])
    """

    scale = "rank_only"

    def __init__(
        self, layer: str | None = None, similarity: str = "dot", tokens: str = "mean", snapshots: str = "last"
    ) -> None:
        super().__init__(snapshots)
        check_choice(self, "similarity", similarity, ("dot", "cosine", "l2"))
        check_choice(self, "tokens", tokens, ("mean", "last", "flatten"))
        self.layer = check_layer_name(self, layer)
        self.similarity = similarity
        self.tokens = tokens

    def score_snapshot(self, snapshot: SnapshotFeatures) -> Iterator[ScoreBlock]:
        """Compare with the targets, batch after batch; see :meth:`ModelMethod.score_snapshot`.

        Args:
            snapshot: with its model.

        Yields:
            Blocks of rows.
        """
        model = model_of(snapshot)
        refuse_target_function(model, type(self).__name__)

        def columns(seen: Observation) -> dict[str, Tensor]:
            return {"representations": representation(seen, self.layer, self.tokens).to(model.dtype)}

        found = observed(model, model.target_batches(snapshot.target_rows), columns, self.layer)
        parts = [values["representations"] for _, values in found]
        for rows, values in observed(model, model.train_batches(), columns, self.layer):
            h = values["representations"]
            targets = torch.cat(parts) if parts else h[:0]
            scores, self_influence = self._compare(h, targets)
            yield ScoreBlock(range(rows[0], rows[-1] + 1), scores.cpu(), self_influence.cpu())

    def _compare(self, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``(b, m)`` and self-influence ``(b,)`` of representations ``(b, d)`` and ``(m, d)``."""
        if self.similarity == "l2":
            return -_squared_distances(h, targets), h.new_zeros(len(h))
        if self.similarity == "cosine":
            h, targets = normalize(h), normalize(targets)
        return h @ targets.T, h.square().sum(1)


def _squared_distances(h: Tensor, targets: Tensor) -> Tensor:
    """Squared distances ``(b, m)``, by inner products where their rounding does not drown what is close."""
    if h.dtype == torch.float64:
        return torch.cdist(h, targets, compute_mode="donot_use_mm_for_euclid_dist").square()
    center = targets.double().mean(0) if len(targets) else 0.0
    left, right = h.double() - center, targets.double() - center
    norms = left.square().sum(1)[:, None] + right.square().sum(1)
    return norms.addmm_(left, right.T, alpha=-2).clamp_(min=0).to(h.dtype)


def representation(seen: Observation, layer: str | None, tokens: str = "mean") -> Tensor:
    """Take the representation of each sample from an observed layer.

    Returns ``(b, d)``.

    Example:
        >>> x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> representation(Observation("head", torch.nn.Identity(), x, x, None, None), None)
        tensor([[2., 3.]])
    """
    values = seen.input if layer is None else seen.output
    if values.ndim == 3 and tokens != "flatten":
        return values.mean(1) if tokens == "mean" else values[:, -1]
    return values.reshape(len(values), -1)
