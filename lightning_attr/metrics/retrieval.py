"""Retrieval of relevant training samples, as in fact tracing: mean reciprocal rank and Recall@k.

They measure relevance as annotated, not what retraining would change: lexical search often does better here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_attr.arguments.checks import check_instance, check_int, check_numbers
from lightning_attr.metrics.bootstrap import IntervalMetric, check_bootstrap, count_undefined, mean_interval
from lightning_attr.metrics.checks import as_mask, check_matrix
from lightning_attr.metrics.figures import BLUE, defined, draw_mean, legend_above, new_axes
from lightning_attr.metrics.functional import score_blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UNDEFINED = "no training sample or every one is relevant to them"


class RetrievalScore(NamedTuple):
    """Result of :func:`mean_reciprocal_rank` and :func:`recall_at_k`; float64 on the device of the scores.

    Attributes:
        mean: Mean of `per_target` over the targets where it is defined, `()`.
        low: Lower end of the bootstrap interval, `()`; NaN with `bootstrap=0`.
        high: Upper end of the bootstrap interval, `()`; NaN with `bootstrap=0`.
        per_target: Reciprocal rank or recall, `(n_target,)`, in [0, 1]; NaN where undefined.
        undefined: Number of targets left out because no training sample or every one is relevant to them.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import mean_reciprocal_rank
        >>> score = mean_reciprocal_rank(torch.tensor([[0.1], [0.7]]), torch.tensor([[True], [False]]))
        >>> float(score.mean), score.undefined
        (0.5, 0)
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    per_target: Tensor
    undefined: int


Relevance = Tensor | Sequence[Sequence[int] | Tensor]


def mean_reciprocal_rank(
    scores: Tensor, relevant: Relevance, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0
) -> RetrievalScore:
    """Mean over targets of one over the rank of the first relevant training sample, highest score first.

    Among tied scores the value is the expectation over a random order, so constant scores give what random retrieval
    would. The interval holds the percentiles of a bootstrap over targets.

    Args:
        scores: Attribution scores, `(n_train, n_target)`. Read in row blocks, so they may be memory-mapped.
        relevant: The samples relevant to each target: `(n_train, n_target)`, bool or 0/1, or for each target the
            indices of its samples.
        bootstrap: Number of resamples; 0 skips the interval.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the bootstrap.

    Returns:
        Mean, interval, reciprocal ranks by target and the number of undefined targets.

    Raises:
        ValueError: If `scores` is not a non-empty finite matrix, `relevant` does not fit it, or `bootstrap` or
            `confidence` is out of range.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import mean_reciprocal_rank
        >>> scores = torch.tensor([[0.9, 0.1], [0.5, 0.2], [0.1, 0.3]])
        >>> mean_reciprocal_rank(scores, [[1, 2], [2]]).per_target
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    check_bootstrap(bootstrap, confidence, seed)
    per_target = _reciprocal_ranks(scores, _relevance(scores, relevant))
    return _retrieval_score(per_target, "reciprocal rank", bootstrap, confidence, seed)


def recall_at_k(
    scores: Tensor, relevant: Relevance, k: int = 10, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0
) -> RetrievalScore:
    """Mean over targets of the share of the relevant training samples that is among the k highest scores.

    A target with more than k relevant samples cannot reach 1. Samples tied at the threshold count with their chance of
    inclusion. The interval holds the percentiles of a bootstrap over targets.

    Args:
        scores: Attribution scores, `(n_train, n_target)`. Read in row blocks, so they may be memory-mapped.
        relevant: The samples relevant to each target: `(n_train, n_target)`, bool or 0/1, or for each target the
            indices of its samples.
        k: Number of samples retrieved, from 1 to n_train.
        bootstrap: Number of resamples; 0 skips the interval.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the bootstrap.

    Returns:
        Mean, interval, recall by target and the number of undefined targets.

    Raises:
        ValueError: If `scores` is not a non-empty finite matrix, `relevant` does not fit it, or `k`, `bootstrap` or
            `confidence` is out of range.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import recall_at_k
        >>> scores = torch.tensor([[0.9, 0.1], [0.5, 0.2], [0.1, 0.3]])
        >>> recall_at_k(scores, [[1, 2], [2]], k=2).per_target
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    check_bootstrap(bootstrap, confidence, seed)
    per_target = _recalls(scores, _relevance(scores, relevant), k)
    return _retrieval_score(per_target, f"recall at {k}", bootstrap, confidence, seed)


class _RetrievalMetric(IntervalMetric[RetrievalScore]):
    """Keeps one value for each target, so the training samples may differ between updates."""

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    value_name: str

    per_target: list[Tensor]

    def __init__(self, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(bootstrap, confidence, seed, **kwargs)
        self.add_state("per_target", default=[], dist_reduce_fx="cat")

    def compute(self) -> Tensor:
        """Return the mean over the targets where it is defined, a float64 scalar."""
        return self._score(bootstrap=0).mean

    def _score(self, bootstrap: int) -> RetrievalScore:
        per_target = dim_zero_cat(self.per_target)
        return _retrieval_score(per_target, self.value_name, bootstrap, self.confidence, self.seed)

    def _draw(self, summary: RetrievalScore, ax: Axes | None) -> tuple[Figure, Axes]:
        return plot_retrieval(summary, self.value_name, ax)


class MeanReciprocalRank(_RetrievalMetric):
    """Mean reciprocal rank of the first relevant sample; the pure function is :func:`mean_reciprocal_rank`.

    Several updates add targets.

    Args:
        bootstrap: Number of resamples behind the interval of :meth:`summary`; 0 skips it.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the bootstrap.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If `bootstrap` or `confidence` is out of range.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import MeanReciprocalRank
        >>> metric = MeanReciprocalRank()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.5, 0.2], [0.1, 0.3]]), relevant=[[1, 2], [2]])
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    value_name = "reciprocal rank"

    def update(self, scores: Tensor, relevant: Relevance) -> None:
        """Add targets.

        Args:
            scores: `(n_train, n_target)`.
            relevant: `(n_train, n_target)`, bool or 0/1, or for each target the indices of its samples.

        Raises:
            ValueError: If an argument is not as :func:`mean_reciprocal_rank` wants it.
        """
        self.per_target.append(_reciprocal_ranks(scores, _relevance(scores, relevant)))


class RecallAtK(_RetrievalMetric):
    """Share of the relevant samples among the k highest scores; the pure function is :func:`recall_at_k`.

    Several updates add targets.

    Args:
        k: Number of samples retrieved, from 1 to n_train.
        bootstrap: Number of resamples behind the interval of :meth:`summary`; 0 skips it.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the bootstrap.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If `k`, `bootstrap` or `confidence` is out of range.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import RecallAtK
        >>> metric = RecallAtK(k=2)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.5, 0.2], [0.1, 0.3]]), relevant=[[1, 2], [2]])
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    def __init__(
        self, k: int = 10, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(bootstrap, confidence, seed, **kwargs)
        k = check_int(self, "k", k, minimum=1)
        self.k, self.value_name = k, f"recall at {k}"

    def update(self, scores: Tensor, relevant: Relevance) -> None:
        """Add targets.

        Args:
            scores: `(n_train, n_target)`.
            relevant: `(n_train, n_target)`, bool or 0/1, or for each target the indices of its samples.

        Raises:
            ValueError: If an argument is not as :func:`recall_at_k` wants it.
        """
        self.per_target.append(_recalls(scores, _relevance(scores, relevant), self.k))


def _retrieval_score(per_target: Tensor, name: str, bootstrap: int, confidence: float, seed: int) -> RetrievalScore:
    undefined = count_undefined(per_target, name, _UNDEFINED)
    low, high = mean_interval(per_target, bootstrap, confidence, seed)
    return RetrievalScore(per_target.nanmean(), low, high, per_target, undefined)


def _reciprocal_ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """Return the expected reciprocal rank of the first relevant sample, `(n_target,)`; NaN where undefined."""
    best = scores.new_full((scores.shape[1],), -torch.inf, dtype=torch.float64)
    for rows, block in score_blocks(scores):
        best = torch.maximum(best, block.masked_fill_(~relevant[rows], -torch.inf).amax(0))
    above, tied, tied_relevant = (torch.zeros_like(best, dtype=torch.long) for _ in range(3))
    for rows, block in score_blocks(scores):
        level = block == best
        above += (block > best).sum(0)
        tied += level.sum(0)
        tied_relevant += (level & relevant[rows]).sum(0)
    counts = zip(above.tolist(), tied.tolist(), tied_relevant.tolist(), strict=True)
    values = best.new_tensor([_expected_reciprocal(*count) for count in counts])
    return values.masked_fill(~_is_defined(relevant), torch.nan)


def _expected_reciprocal(above: int, tied: int, relevant: int) -> float:
    """Return E[1 / rank] of the first of `relevant` among `tied` samples in random order, below `above` others."""
    if relevant == tied:
        return 1 / (above + 1)
    place = torch.arange(1, tied - relevant + 2, dtype=torch.float64)  # of the first relevant one among the tied
    # Each tied sample before it was irrelevant, drawn from those that were left.
    missed = ((tied - relevant + 1 - place) / (tied + 1 - place)).cumprod(0)
    chance = missed.roll(1) * relevant / (tied + 1 - place)
    chance[0] = relevant / tied
    return float((chance / (above + place)).sum())


def _recalls(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    """Return the expected share of the relevant samples among the k highest, `(n_target,)`; NaN where undefined."""
    check_int(None, "k", k, 1, len(scores), remedy=f"There are {len(scores)} training samples.")
    highest = scores.new_empty(0, scores.shape[1], dtype=torch.float64)
    for _, block in score_blocks(scores):
        merged = torch.cat([highest, block])
        highest = merged.topk(min(k, len(merged)), dim=0).values
    threshold = highest[-1]
    above, tied, found, found_tied = (torch.zeros_like(threshold) for _ in range(4))
    for rows, block in score_blocks(scores):
        higher, level = block > threshold, block == threshold
        above += higher.sum(0)
        tied += level.sum(0)
        found += (higher & relevant[rows]).sum(0)
        found_tied += (level & relevant[rows]).sum(0)
    recall = (found + found_tied * (k - above) / tied) / relevant.sum(0)
    return recall.masked_fill(~_is_defined(relevant), torch.nan)


def _is_defined(relevant: Tensor) -> Tensor:
    n_relevant = relevant.sum(0)
    return (n_relevant > 0) & (n_relevant < len(relevant))


def _relevance(scores: Tensor, relevant: Relevance) -> Tensor:
    # As a bool matrix of the shape and on the device of `scores`.
    check_matrix("scores", scores)
    if isinstance(relevant, Tensor):
        if relevant.shape != scores.shape:
            raise ValueError(
                f"Expected argument `relevant` to have shape (n_train, n_target) = {tuple(scores.shape)} as `scores`,"
                f" or to list the relevant samples of each target, but got shape {tuple(relevant.shape)}."
            )
        return as_mask("relevant", relevant).to(scores.device)
    n_train, n_target = scores.shape
    what = "a mask (n_train, n_target), or a list of indices for each target"
    check_instance(None, "relevant", relevant, (list, tuple), what)
    if len(relevant) != n_target:
        raise ValueError(
            f"Expected argument `relevant` to list the relevant samples of each of the {n_target} targets,"
            f" but got {len(relevant)} lists."
        )
    mask = torch.zeros(n_train, n_target, dtype=torch.bool, device=scores.device)
    for j, indices in enumerate(relevant):
        rows = check_numbers(None, f"relevant[{j}]", indices, "a list of indices").long().to(scores.device)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < n_train:
            raise ValueError(
                f"Expected argument `relevant` to hold indices from 0 to {n_train - 1}, but those of target {j} run"
                f" from {int(rows.min())} to {int(rows.max())}."
            )
        mask[rows, j] = True
    return mask


def plot_retrieval(
    score: RetrievalScore, label: str = "reciprocal rank", ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Plot the values by target as a histogram, with their mean and its interval.

    Args:
        score: Result of :func:`~lightning_attr.metrics.mean_reciprocal_rank` or
            :func:`~lightning_attr.metrics.recall_at_k`.
        label: Name of the value, the label of the horizontal axis.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Raises:
        TypeError: If `score` is none.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import mean_reciprocal_rank, plot_retrieval
        >>> fig, ax = plot_retrieval(mean_reciprocal_rank(torch.tensor([[0.1], [0.7]]), [[0]]))
        >>> ax.get_xlabel()
        'reciprocal rank'
    """
    check_instance(
        "plot_retrieval", "score", score, RetrievalScore, "what `mean_reciprocal_rank` or `recall_at_k` returns"
    )
    fig, ax = new_axes(ax)
    ax.hist(defined(score.per_target).numpy(), bins=torch.linspace(0, 1, 21).tolist(), color=BLUE, alpha=0.35)
    draw_mean(ax, "mean", score)
    ax.set(xlabel=label, ylabel="targets", xlim=(-0.02, 1.02))
    legend_above(ax)
    return fig, ax
