"""What is logged of a snapshot: figures of the self-influence of the training set."""

from __future__ import annotations

from torch import Tensor

from lightning_attr.metrics.functional import noisy_label_auroc, noisy_label_recall
from lightning_attr.metrics.ranks import spearman


def self_influence_statistics(
    self_influence: Tensor, previous: Tensor | None = None, noise_mask: Tensor | None = None
) -> dict[str, float]:
    """Summarise the self-influence at one snapshot.

    Shapes: self_influence (n_train,), noise_mask (n_train,). Returns name -> figure, for a logger: mean, 95th
    percentile, share of the top decile in the sum of absolute values, and what the optional arguments add.
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
