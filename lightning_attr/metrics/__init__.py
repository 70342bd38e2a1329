"""Metrics of attribution quality: torchmetrics classes with `plot()`, each beside a pure function.

Tensors in, tensors out: scores are `(n_train, n_target)` and positive when the training sample helps the target.
"""

from lightning_attr.metrics.agreement import (
    RankAgreement,
    RankAgreementScore,
    kendall,
    plot_rank_agreement,
    rank_agreement,
)
from lightning_attr.metrics.brittleness import BrittlenessCurve, FlipCurve, brittleness_curve, plot_brittleness_curve
from lightning_attr.metrics.coreset import PredictedEffect, greedy_coreset, predicted_effect
from lightning_attr.metrics.correlation import CorrelationScore
from lightning_attr.metrics.data_selection import (
    DataSelectionCurve,
    SelectionCurve,
    data_selection_curve,
    plot_selection_curve,
)
from lightning_attr.metrics.datamodeling import (
    DatamodelingScore,
    LinearDatamodelingScore,
    linear_datamodeling_score,
    plot_datamodeling_score,
    plot_datamodeling_score_against_cost,
)
from lightning_attr.metrics.functional import (
    effective_proponents,
    noisy_label_auroc,
    noisy_label_recall,
    noisy_label_recall_area,
    noisy_label_recall_curve,
    overlap,
    share_harmful,
    share_helpful,
)
from lightning_attr.metrics.leave_one_out import (
    LeaveOneOutCorrelation,
    LeaveOneOutScore,
    leave_one_out_correlation,
    plot_leave_one_out_correlation,
)
from lightning_attr.metrics.noisy_labels import (
    NoisyLabelAUROC,
    NoisyLabelPrecision,
    NoisyLabelRecall,
    plot_precision_curve,
    plot_recall_curve,
)
from lightning_attr.metrics.output_change import (
    OutputChange,
    QueryLossDifference,
    TailPatch,
    plot_output_change,
    query_loss_difference,
    tail_patch,
)
from lightning_attr.metrics.plotting import plot_image_grid, plot_samples, plot_score_heatmap, plot_self_influence
from lightning_attr.metrics.precision import noisy_label_precision, noisy_label_precision_curve
from lightning_attr.metrics.ranks import spearman
from lightning_attr.metrics.retrieval import (
    MeanReciprocalRank,
    RecallAtK,
    RetrievalScore,
    mean_reciprocal_rank,
    plot_retrieval,
    recall_at_k,
)
from lightning_attr.metrics.trajectory_plots import plot_denoising_steps

__all__ = [
    "BrittlenessCurve",
    "CorrelationScore",
    "DataSelectionCurve",
    "DatamodelingScore",
    "FlipCurve",
    "LeaveOneOutCorrelation",
    "LeaveOneOutScore",
    "LinearDatamodelingScore",
    "MeanReciprocalRank",
    "NoisyLabelAUROC",
    "NoisyLabelPrecision",
    "NoisyLabelRecall",
    "OutputChange",
    "PredictedEffect",
    "QueryLossDifference",
    "RankAgreement",
    "RankAgreementScore",
    "RecallAtK",
    "RetrievalScore",
    "SelectionCurve",
    "TailPatch",
    "brittleness_curve",
    "data_selection_curve",
    "effective_proponents",
    "greedy_coreset",
    "kendall",
    "leave_one_out_correlation",
    "linear_datamodeling_score",
    "mean_reciprocal_rank",
    "noisy_label_auroc",
    "noisy_label_precision",
    "noisy_label_precision_curve",
    "noisy_label_recall",
    "noisy_label_recall_area",
    "noisy_label_recall_curve",
    "overlap",
    "plot_brittleness_curve",
    "plot_datamodeling_score",
    "plot_datamodeling_score_against_cost",
    "plot_denoising_steps",
    "plot_image_grid",
    "plot_leave_one_out_correlation",
    "plot_output_change",
    "plot_precision_curve",
    "plot_rank_agreement",
    "plot_recall_curve",
    "plot_retrieval",
    "plot_samples",
    "plot_score_heatmap",
    "plot_selection_curve",
    "plot_self_influence",
    "predicted_effect",
    "query_loss_difference",
    "rank_agreement",
    "recall_at_k",
    "share_harmful",
    "share_helpful",
    "spearman",
    "tail_patch",
]
