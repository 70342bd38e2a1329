"""Metrics of attribution quality: torchmetrics classes with `plot()`, each beside a pure function.

Tensors in, tensors out: scores are `(n_train, n_target)` and positive when the training sample helps the target.
"""

from lightning_attr.metrics.data_selection import DataSelectionCurve, SelectionCurve, data_selection_curve
from lightning_attr.metrics.datamodeling import DatamodelingScore, LinearDatamodelingScore, linear_datamodeling_score
from lightning_attr.metrics.functional import (
    effective_proponents,
    noisy_label_auroc,
    noisy_label_recall,
    noisy_label_recall_area,
    noisy_label_recall_curve,
    overlap,
    share_harmful,
    share_helpful,
    spearman,
)
from lightning_attr.metrics.noisy_labels import NoisyLabelAUROC, NoisyLabelRecall
from lightning_attr.metrics.plotting import (
    plot_datamodeling_score,
    plot_image_grid,
    plot_recall_curve,
    plot_samples,
    plot_score_heatmap,
    plot_selection_curve,
    plot_self_influence,
)

__all__ = [
    "DataSelectionCurve",
    "DatamodelingScore",
    "LinearDatamodelingScore",
    "NoisyLabelAUROC",
    "NoisyLabelRecall",
    "SelectionCurve",
    "data_selection_curve",
    "effective_proponents",
    "linear_datamodeling_score",
    "noisy_label_auroc",
    "noisy_label_recall",
    "noisy_label_recall_area",
    "noisy_label_recall_curve",
    "overlap",
    "plot_datamodeling_score",
    "plot_image_grid",
    "plot_recall_curve",
    "plot_samples",
    "plot_score_heatmap",
    "plot_selection_curve",
    "plot_self_influence",
    "share_harmful",
    "share_helpful",
    "spearman",
]
