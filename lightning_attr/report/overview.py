"""A result in ten lines: what ``print`` and notebooks show."""

from __future__ import annotations

from markupsafe import Markup
from torch import Tensor

from lightning_attr.report.shown import ShownResult, knows_self_influence

_SHOWN = 4


def overview(result: ShownResult) -> str:
    """Write what a result holds.

    Returns at most ten lines.
    """
    title, rows = _rows(result)
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in rows)])


def overview_html(result: ShownResult) -> str:
    """Write the same for a notebook."""
    title, rows = _rows(result)
    lines = [Markup("<tr><th style='text-align:left'>{}</th><td>{}</td></tr>").format(*row) for row in rows]
    return Markup("<p><b>{}</b></p><table>{}</table>").format(title, Markup("").join(lines))


def _rows(result: ShownResult) -> tuple[str, list[tuple[str, str]]]:
    (n, m), provenance = result.scores.shape, result.scores.provenance
    by = f" by {provenance['method']}" if "method" in provenance else ""
    snapshots = provenance.get("snapshots")
    over = f", {len(snapshots)} snapshot{'s' * (len(snapshots) != 1)}" if isinstance(snapshots, (list, tuple)) else ""
    rows = [
        ("scores", f"{type(result.scores).__name__}: {result.scores.effective_proponents:,.0f} effective proponents"),
        ("helps most", _extremes(result, result.data_value)),
        ("hurts most", _extremes(result, -result.data_value, -1)),
    ]
    if knows_self_influence(result):
        rows.append(("suspicious", _extremes(result, result.self_influence)))
    if result.labels is not None:
        rows.append(("labels", f"{len(result.labels.unique())} classes"))
    if result.noise_mask is not None:
        auroc = result.metrics.get("noisy_label_auroc")
        found = "" if auroc is None else f", AUROC {auroc:.3f} (by loss {result.metrics['loss_noisy_label_auroc']:.3f})"
        rows.append(("known noise", f"{int(result.noise_mask.sum()):,} samples{found}"))
    if result.trained_on is not None and not result.trained_on.all():
        rows.append(("never drawn", f"{int((~result.trained_on).sum()):,} samples, whose scores are zero"))
    if result.exposure is not None:
        least, most = int(result.exposure.min()), int(result.exposure.max())
        rows.append(("trained on", f"{least:,} times each" if least == most else f"{least:,} to {most:,} times"))
    rows.append(("next", ".scores.topk(5), .select(0.9), .plot(...), .report('report.html', train=..., targets=...)"))
    return f"{type(result).__name__}{by}: {n:,} training samples x {m:,} targets{over}", rows


def _extremes(result: ShownResult, order: Tensor, sign: int = 1) -> str:
    """The samples with the highest values, and these."""
    first = order.argsort(descending=True, stable=True)[:_SHOWN]
    pairs = zip(result.scores.train_indices[first].tolist(), order[first].tolist(), strict=True)
    return ", ".join(f"#{index} ({sign * value:+.3g})" for index, value in pairs)
