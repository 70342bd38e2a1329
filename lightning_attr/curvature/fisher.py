r"""The gradients whose second moments are the Fisher information, :math:`F = \frac1n \sum_i E\,[g_i g_i^\top]`.

The expectation is over labels from the model's own distribution, which makes it the Gauss-Newton matrix of the loss
(Martens, 2020, section 9); over the observed labels it is the empirical Fisher, which is another matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal

from lightning_attr.batches.nested import select_rows
from lightning_attr.batches.running_sum import running_sum
from lightning_attr.gradients import HookedGradients, ParameterGradient
from lightning_attr.gradients.hooks import LayerSink
from lightning_attr.outputs import ModelOutput
from lightning_attr.randomness.streams import row_uniforms

_FEW_LABELS = 16
_KEPT_BYTES = 2**28
"""Factored gradients that stay in memory from one pass to the next."""

GradientStream: TypeAlias = Callable[[LayerSink], object]
"""Streams the gradients of a batch into a sink, layer by layer."""

Labels: TypeAlias = Literal["sampled", "observed", "exact", "mixed"]


@dataclass(frozen=True)
class GradientBatch:
    """What a batch adds to a curvature: the outer products of the gradients in all of its streams.

    Args:
        streams: each gives the gradients of some of the samples, for one label per sample or for several: then the
            samples follow each other as often as there are labels, and the gradients are times the square roots of the
            labels' weights.
        samples: number of samples, of all streams, counted once.
        labels: how many labels a sample has.

    Example:
        >>> GradientBatch([lambda sink: sink({"weight": torch.ones(4, 1)})], samples=4).samples
        4
    """

    streams: Sequence[GradientStream]
    samples: int
    labels: int = 1


class RepeatedPasses:
    """Passes that have the same gradients every time: where these are small, they are computed once.

    Args:
        read: makes a pass.

    Example:
        >>> reads = []
        >>> batch = GradientBatch([lambda sink: sink({"weight": torch.ones(4, 1)})], samples=4)
        >>> passes = RepeatedPasses(lambda: iter([reads.append("read") or batch]))
        >>> for number in range(3):
        ...     for own in passes(number):
        ...         for stream in own.streams:
        ...             stream(lambda gradients: print(tuple(gradients["weight"].shape)))
        (4, 1)
        (4, 1)
        (4, 1)
        >>> reads
        ['read']
    """

    def __init__(self, read: Callable[[], Iterable[GradientBatch]]) -> None:
        self.read = read
        self._kept: list[GradientBatch] | None = None

    def __call__(self, number: int) -> Iterator[GradientBatch]:
        """Yield the batches; their streams have to be run before the next one is taken."""
        if self._kept is not None:
            yield from self._kept
            return
        kept, size = [], 0
        for batch in self.read():
            if size > _KEPT_BYTES:
                yield batch
                continue
            recordings = [_Recording(stream) for stream in batch.streams]
            yield replace(batch, streams=recordings)
            size += sum(recording.size for recording in recordings)
            if size <= _KEPT_BYTES:
                kept.append(replace(batch, streams=[recording.again for recording in recordings]))
            else:
                kept.clear()
        if size <= _KEPT_BYTES:
            self._kept = kept


class _Recording:
    """A stream, and what it gave."""

    def __init__(self, stream: GradientStream) -> None:
        self.stream = stream
        self.found: list[Mapping[str, ParameterGradient]] = []
        self.size = 0

    def __call__(self, sink: LayerSink) -> None:
        def both(gradients: Mapping[str, ParameterGradient]) -> None:
            self.found.append(gradients)
            for gradient in gradients.values():
                parts = [gradient] if isinstance(gradient, Tensor) else vars(gradient).values()
                self.size += sum(part.nbytes for part in parts if isinstance(part, Tensor))
            sink(gradients)

        self.stream(both)

    @torch.no_grad()
    def again(self, sink: LayerSink) -> None:
        for gradients in self.found:
            sink(gradients)


def fisher_batch(
    gradients: HookedGradients,
    step: Callable[[Any], tuple[Any, Any]],
    batch: Any,
    model_output: ModelOutput,
    rows: Sequence[int],
    *,
    labels: Labels = "sampled",
    key: tuple[object, ...] = (),
    draws: int = 1,
) -> GradientBatch:
    r"""Prepare the gradients of one batch.

    Shapes: step (outputs, targets). Returns the batch, from which nothing has been run yet, but for "exact" one sample
    that tells how many labels there are.
    """
    if labels not in get_args(Labels):
        raise ValueError(f"Expected argument `labels` to be one of {', '.join(get_args(Labels))}, but got {labels!r}.")
    size = len(rows)

    def loss() -> Tensor:
        outputs, targets = step(batch)
        if labels == "sampled":
            with torch.no_grad():
                drawn = sample(model_output.distribution(outputs, targets), rows, "labels", *key)
                targets = model_output.relabelled(targets, drawn)
        return model_output.loss(outputs, targets)

    def weighted(outputs: Any, targets: Any, samples: int) -> Tensor:
        with torch.no_grad():
            weights, values = quadrature(model_output.distribution(outputs, targets), samples)
            targets = model_output.relabelled(targets, values)
        losses = model_output.loss(outputs, targets)
        return losses * weights.sqrt().to(losses)

    def listed(positions: Sequence[int]) -> Tensor:
        return weighted(*step(select_rows(batch, size, [*positions] * count)), count * len(positions))

    def mixed(draw: int) -> Tensor:
        outputs, targets = step(batch)
        with torch.no_grad():
            count = label_count(model_output.distribution(outputs, targets), size)
        again = torch.arange(size).repeat(count)
        losses = weighted(select_rows(outputs, size, again), select_rows(targets, size, again), len(again))
        signs = 1 - 2 * (row_uniforms(rows, count, "signs", draw, *key) < 0.5).to(losses)
        total: Tensor = (losses.view(count, size).T * signs).sum(1)
        return total / math.sqrt(draws)

    if labels == "mixed":
        return GradientBatch([partial(gradients, partial(mixed, draw), size) for draw in range(draws)], size)
    if labels != "exact":
        return GradientBatch([partial(gradients, loss, size)], size)
    with torch.no_grad():
        count = label_count(model_output.distribution(*step(select_rows(batch, size, [0]))), 1)
    height = max(1, size // count)
    parts = [range(start, min(start + height, size)) for start in range(0, size, height)]
    streams = [partial(gradients, partial(listed, part), count * len(part)) for part in parts]
    return GradientBatch(streams, size, count)


def usual_labels(distribution: Distribution, samples: int, draws: int | None = None) -> Labels:
    """Choose how to take the expectation over labels: exactly as long as that costs little.

    Returns "sampled" for more than 16 labels a sample; else "mixed" if there are more labels than draws, else "exact".
    """
    several = not isinstance(distribution, Normal) and distribution.batch_shape.numel() != samples
    if several or (count := label_count(distribution, samples)) > _FEW_LABELS:
        return "sampled"
    return "exact" if draws is None or count <= draws else "mixed"


def label_count(distribution: Distribution, samples: int) -> int:
    """Count the labels that :func:`quadrature` lists, with its arguments and errors.

    Example:
        >>> label_count(Bernoulli(probs=torch.tensor([0.25])), 1)
        2
    """
    shape = distribution.batch_shape
    if isinstance(distribution, Normal):
        return shape.numel() // samples
    probabilities: Tensor = _discrete(distribution).probs
    if shape.numel() != samples:
        raise ValueError(
            f'Expected one target a sample for `labels="exact"`, but got {tuple(shape)} for {samples} samples: their '
            'combinations are too many. Pass `labels="sampled"`.'
        )
    return 2 if isinstance(distribution, Bernoulli) else probabilities.shape[-1]


def sample(distribution: Distribution, rows: Sequence[int], *key: object) -> Tensor:
    """Draw from each sample's distribution by its inverse, so that a draw depends on the row and the key alone.

    Returns the draws, ``(b, ...)``: int64 of a categorical distribution, else float.
    """
    shape = distribution.batch_shape
    uniforms = row_uniforms(rows, shape.numel() // max(len(rows), 1), *key).reshape(shape)
    if isinstance(distribution, Normal):
        drawn: Tensor = distribution.icdf(uniforms.to(distribution.loc))
        return drawn
    probabilities: Tensor = _discrete(distribution).probs
    uniforms = uniforms.to(probabilities)
    if isinstance(distribution, Bernoulli):
        return (uniforms < probabilities).to(probabilities)
    cumulative = running_sum(probabilities)
    below = cumulative <= uniforms.unsqueeze(-1) * cumulative[..., -1:]
    return below.sum(-1).clamp(max=cumulative.shape[-1] - 1)


def quadrature(distribution: Distribution, samples: int) -> tuple[Tensor, Tensor]:
    r"""Give labels and weights whose sum is the exact expectation of a gradient's outer product.

    All labels of a discrete distribution; of a normal one, with a loss quadratic in the label, a step along each
    of the ``r`` values of a sample, :math:`\mu + \sqrt{r} \sigma e_k` with the weight :math:`1 / r`.

    Returns weights ``(c * b,)``, and labels of the distribution's shape.
    """
    shape, count = distribution.batch_shape, label_count(distribution, samples)
    if isinstance(distribution, Normal):
        steps = torch.eye(count).repeat_interleave(samples // count, 0).to(distribution.loc).reshape(shape)
        weights = torch.full((samples,), 1 / count).to(distribution.loc)
        return weights, distribution.loc + math.sqrt(count) * distribution.scale * steps
    probabilities: Tensor = _discrete(distribution).probs
    labels = torch.arange(count, device=probabilities.device).repeat_interleave(samples // count).reshape(shape)
    labels = labels.to(probabilities) if isinstance(distribution, Bernoulli) else labels
    return distribution.log_prob(labels).exp().reshape(samples), labels


def _discrete(distribution: Distribution) -> Bernoulli | Categorical:
    if not isinstance(distribution, (Bernoulli, Categorical)):
        raise TypeError(
            "Expected `model_output.distribution` to return a Categorical, Bernoulli or Normal of "
            f"torch.distributions, but got {type(distribution).__name__}."
        )
    return distribution
