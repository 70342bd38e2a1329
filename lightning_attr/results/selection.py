"""Which training samples to keep, and what keeping them is predicted to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_choice, check_flag, check_float, check_numbers
from lightning_attr.arguments.messages import argument_message
from lightning_attr.metrics.coreset import PredictedEffect, greedy_coreset, predicted_effect
from lightning_attr.report.shown import ShownResult, knows_self_influence

_OWNER = "AttributionResult.select"


def select(result: ShownResult, fraction: float, by: str, per_class: bool, objective: str | None) -> Tensor:
    """Choose training samples to keep; see :meth:`lightning_attr.AttributionResult.select`.

    Returns indices into the training data set, ascending.
    """
    fraction = check_float(_OWNER, "fraction", fraction, above=0, maximum=1)
    values: dict[str, Callable[[], Tensor]] = {
        "data_value": lambda: result.data_value,
        "self_influence": lambda: -result.self_influence,
    }
    check_choice(_OWNER, "by", by, values)
    if by == "self_influence" and not knows_self_influence(result):
        raise ValueError(
            f"{_OWNER}(by='self_influence') needs it, but this result has NaN in its place: its method would take a "
            "target more for each training sample. Let the method compute it (`self_influence=True`), or select by "
            "data value."
        )
    check_choice(_OWNER, "objective", objective, ("prune", "coreset", None))
    if objective is not None and by != "data_value":
        remedy = "An objective has a ranking of its own: leave `by` out, or `objective`."
        raise ValueError(argument_message(_OWNER, "by", f"'data_value' with objective={objective!r}", by, remedy))
    if check_flag(_OWNER, "per_class", per_class) and result.labels is None:
        raise ValueError(
            "Expected class labels for `per_class=True`, but the targets of this model output are no class labels."
        )
    groups = _groups(result, per_class)
    quotas = torch.stack([_count(fraction, int((groups == group).sum())) for group in range(int(groups.max()) + 1)])
    if objective == "coreset":
        rows = _coreset(result.scores, groups, quotas, per_class)
    else:
        rows = _best(values[by](), groups, quotas, at_most_harmful=objective == "prune")
    return result.scores.train_indices[rows.sort().values]


def effect_of(scores: Any, keep: Any) -> PredictedEffect:
    """Predict what training on some samples does; see :meth:`lightning_attr.AttributionResult.predicted_effect`.

    Returns the changes of the targets' mean loss and output.
    """
    owner, expected = "AttributionResult.predicted_effect", "indices into the training data set, each once"
    indices = check_numbers(owner, "keep", keep, expected)
    known: Tensor = scores.train_indices
    wrong_kind = indices.ndim != 1 or indices.is_floating_point() or indices.dtype == torch.bool
    if wrong_kind or not torch.isin(indices, known).all() or len(indices.unique()) != len(indices):
        raise ValueError(argument_message(owner, "keep", expected, keep, "`select` gives such."))
    return predicted_effect(scores.values, torch.isin(known, indices), scores.target_slopes)


def _groups(result: ShownResult, per_class: bool) -> Tensor:
    """The number of each sample's group; -1 for those that training never drew, which are not chosen."""
    groups = torch.zeros(len(result.data_value), dtype=torch.int64)
    if per_class and result.labels is not None:
        groups = torch.searchsorted(result.labels.unique(), result.labels)
    return groups if result.trained_on is None else groups.masked_fill(~result.trained_on, -1)


def _count(fraction: float, members: int) -> Tensor:
    return torch.tensor(max(1, round(fraction * members)) if members else 0)


def _best(value: Tensor, groups: Tensor, quotas: Tensor, at_most_harmful: bool) -> Tensor:
    """The highest of each group; with ``at_most_harmful`` also all others that help."""
    kept = []
    for group, quota in enumerate(quotas.tolist()):
        members = (groups == group).nonzero().flatten()
        order = members[value[members].argsort(descending=True, stable=True)]
        helpful = int((value[members] >= 0).sum()) if at_most_harmful else 0
        kept.append(order[: max(quota, helpful)])
    return torch.cat(kept)


def _coreset(scores: Any, groups: Tensor, quotas: Tensor, per_class: bool) -> Tensor:
    """Greedily, among the samples that training drew."""
    drawn = (groups >= 0).nonzero().flatten()
    values: Tensor = scores.values
    values = values if len(drawn) == len(groups) else values[drawn]
    return drawn[greedy_coreset(values, int(quotas.sum()), groups[drawn], quotas if per_class else None)]
