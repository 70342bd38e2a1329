"""What is logged of a snapshot: figures of the self-influence of the training set."""

from __future__ import annotations

from torch import Tensor

from lightning_attr.metrics.functional import noisy_label_auroc, noisy_label_recall
from lightning_attr.metrics.ranks import spearman


def self_influence_statistics(
    self_influence: Tensor, previous: Tensor | None = None, noise_mask: Tensor | None = None
) -> dict[str, float]:
    """Summarise the self-influence at one snapshot.

    Args:
        self_influence: ``(n_train,)``, float, in units of the model output.
        previous: the same at the snapshot before, for the rank stability (Spearman).
        noise_mask: ``(n_train,)``, bool: samples known to be mislabelled, for AUROC and recall.

    Returns:
        Name -> figure, for a logger: mean, 95th percentile, share of the top decile in the sum of absolute values, and
        what the optional arguments add.

    Example:
        >>> import torch
        >>> statistics = self_influence_statistics(torch.tensor([1.0, 1.0, 2.0, 4.0]))
        >>> statistics["attribution/self_influence_mean"], statistics["attribution/self_influence_top_decile_share"]
        (2.0, 0.5)
    """
    decile = max(1, round(0.1 * len(self_influence)))
    magnitude = self_influence.abs()
    statistics = {
        "self_influence_mean": self_influence.mean(),
        "self_influence_p95": self_influence.quantile(0.95),
        "self_influence_top_decile_share": magnitude.topk(decile).values.sum() / magnitude.sum(),
    }
    if previous is not None:
        statistics["rank_stability"] = spearman(self_influence, previous)
    if noise_mask is not None and noise_mask.any() and not noise_mask.all():
        statistics["noisy_label_auroc"] = noisy_label_auroc(self_influence, noise_mask)
        statistics["noisy_label_recall@10%"] = noisy_label_recall(self_influence, noise_mask)
    return {f"attribution/{name}": float(figure) for name, figure in statistics.items()}
