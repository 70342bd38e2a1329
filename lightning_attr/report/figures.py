"""Figures of a report, as numbers that its page draws: distributions by class, and how fast known noise is found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_attr.metrics import functional
from lightning_attr.report.shown import ShownResult, knows_self_influence

_CLASSES = 20
"""Rows of a distribution; the largest classes have one each."""
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_POINTS = 101
_IN_WORDS = {
    "share_helpful": "share of samples that help the targets",
    "share_harmful": "share of samples that hurt them",
    "effective_proponents": "effective proponents of a target",
    "self_influence_overlap@10%": "of the 10 % of highest self-influence, share that is in the 10 % that hurt most",
    "noisy_label_auroc": "AUROC of finding the known noise by self-influence",
    "noisy_label_recall@10%": "share of the known noise in the 10 % of highest self-influence",
    "selection_noise_share@10%": "share of known noise among the 10 % that help the targets least",
    "loss_noisy_label_auroc": "AUROC of finding the known noise by loss",
    "loss_noisy_label_recall@10%": "share of the known noise in the 10 % of highest loss",
    "loss_selection_noise_share@10%": "share of known noise among the 10 % of highest loss",
}
"""What a reader is told that the figures of :attr:`AttributionResult.metrics` are."""


def figures_in_words(result: ShownResult) -> list[tuple[str, str]]:
    """The figures of a result, each with words for its name."""
    return [(_IN_WORDS[name], f"{value:.4g}") for name, value in result.metrics.items()]


def distributions(result: ShownResult, names: dict[int, str]) -> list[dict[str, Any]]:
    """Quantiles of data value and self-influence, over all samples and in each class.

    Returns a dictionary per figure: its title, the range of its axis, and its rows, each with a name, how many samples
    it has, and the quantiles as shares of the range.
    """
    figures = []
    columns = {"Data value": result.data_value}
    if knows_self_influence(result):
        columns["Self-influence"] = result.self_influence
    for title, column in columns.items():
        groups = {"all": torch.ones(len(column), dtype=torch.bool)}
        if result.labels is not None:
            classes, counts = result.labels.unique(return_counts=True)
            largest = classes[counts.argsort(descending=True, stable=True)[:_CLASSES]].sort().values
            groups |= {names.get(int(label), str(int(label))): result.labels == label for label in largest}
        levels = torch.tensor(_QUANTILES, dtype=torch.float64)
        quantiles = {name: _quantiles(column[members], levels) for name, members in groups.items()}
        low, high = (float(edge) for edge in torch.stack(list(quantiles.values())).aminmax())
        span = (high - low) or 1.0
        figures.append({
            "title": title,
            "low": low,
            "high": high,
            "zero": -low / span if low < 0 < high else None,
            "rows": [
                {"name": name, "count": int(groups[name].sum()), "at": ((values - low) / span).tolist()}
                for name, values in quantiles.items()
            ],
            "left_out": 0 if result.labels is None else max(0, len(classes) - _CLASSES),
        })
    return figures


def detection_curve(result: ShownResult) -> dict[str, list[tuple[float, float]]] | None:
    """Share of the known noise found against the share of samples inspected, most suspicious first.

    Returns points by what samples are ranked by; None without known noise.
    """
    mask = result.noise_mask
    if mask is None or not mask.any() or mask.all():
        return None
    suspicion = {"training loss": result.loss}
    if knows_self_influence(result):
        suspicion = {"self-influence": result.self_influence, **suspicion}
    return {name: _thinned(*functional.noisy_label_recall_curve(values, mask)) for name, values in suspicion.items()}


def _quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """By sorting: torch's own quantile takes 16 million values at most."""
    ordered = values.double().nan_to_num().sort().values
    return ordered[(levels * (len(ordered) - 1)).round().long()]


def _thinned(inspected: Tensor, found: Tensor) -> list[tuple[float, float]]:
    chosen = torch.linspace(0, len(inspected) - 1, min(_POINTS, len(inspected))).round().long()
    return list(zip(inspected[chosen].tolist(), found[chosen].tolist(), strict=True))
