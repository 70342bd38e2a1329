"""The figures of a result that need no retraining."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_attr.metrics import functional
from lightning_attr.report.shown import ShownResult, knows_self_influence


def result_metrics(result: ShownResult) -> dict[str, float]:
    """Compute the figures of :attr:`AttributionResult.metrics`; with a noise mask also how well the noise is found.

    Returns figure by name; those by self-influence and data value stand beside those by plain loss.
    """
    drawn = slice(None) if result.trained_on is None else result.trained_on
    value, loss, self_influence = result.data_value[drawn], result.loss[drawn], result.self_influence[drawn]
    mask = None if result.noise_mask is None else result.noise_mask[drawn]
    metrics: dict[str, Any] = {
        "share_helpful": functional.share_helpful(value[:, None]),
        "share_harmful": functional.share_harmful(value[:, None]),
        "effective_proponents": result.scores.effective_proponents,
    }
    if knows_self_influence(result):
        metrics["self_influence_overlap@10%"] = functional.overlap(self_influence, value)
    if mask is not None and mask.any() and not mask.all():
        suspicion: dict[str, Tensor] = {"": self_influence} if knows_self_influence(result) else {}
        suspicion["loss_"] = loss
        for prefix, suspicious in suspicion.items():
            metrics[f"{prefix}noisy_label_auroc"] = functional.noisy_label_auroc(suspicious, mask)
            metrics[f"{prefix}noisy_label_recall@10%"] = functional.noisy_label_recall(suspicious, mask)
        for prefix, worth in {"": value, "loss_": -loss}.items():
            dropped = worth.argsort(stable=True)[: max(1, round(0.1 * len(worth)))]
            metrics[f"{prefix}selection_noise_share@10%"] = mask[dropped].double().mean()
    return {name: float(figure) for name, figure in metrics.items()}
