r"""The gradients whose second moments are the Fisher information, :math:`F = \frac1n \sum_i E\,[g_i g_i^\top]`.

The expectation is over labels from the model's own distribution, which makes it the Gauss-Newton matrix of the loss
(Martens, 2020, section 9); over the observed labels it is the empirical Fisher, which is another matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal

from lightning_attr.gradients import HookedGradients
from lightning_attr.gradients.hooks import LayerSink
from lightning_attr.outputs import ModelOutput
from lightning_attr.randomness import row_uniforms

__all__ = ["GradientBatch", "GradientStream", "Labels", "fisher_batch"]

GradientStream: TypeAlias = Callable[[LayerSink], object]
"""Streams the gradients of a batch into a sink, layer by layer."""

Labels: TypeAlias = Literal["sampled", "observed", "exact"]


@dataclass(frozen=True)
class GradientBatch:
    """What a batch adds to a curvature: the outer products of the gradients in all of its streams.

    Args:
        streams: each gives the gradients of the samples for one label a sample; weighted labels give gradients times
            the square root of the weight.
        samples: number of samples, counted once, however many streams there are.

    Example:
        >>> GradientBatch([lambda sink: sink({"weight": torch.ones(4, 1)})], samples=4).samples
        4
    """

    streams: Sequence[GradientStream]
    samples: int


def fisher_batch(
    gradients: HookedGradients,
    step: Callable[[], tuple[Any, Any]],
    model_output: ModelOutput,
    rows: Sequence[int],
    *,
    labels: Labels = "sampled",
    key: tuple[object, ...] = (),
) -> GradientBatch:
    """Prepare the gradients of one batch.

    Args:
        gradients: the hooks of the module.
        step: runs the module on the batch and returns ``(outputs, targets)``.
        model_output: gives the loss, and the distribution of the labels.
        rows: dataset row of each of the ``b`` samples, on which its draws depend.
        labels: "sampled" from the model, one a sample; "exact" for the expectation over them, at the price of a pass a
            label; "observed" for the empirical Fisher.
        key: what draws depend on besides the row: seed, snapshot and pass.

    Returns:
        The batch, from which nothing has been run yet, except for "exact" the forward pass that tells the weights.

    Raises:
        NotImplementedError: if the model output has no distribution, when it is needed.
        ValueError: if ``labels`` is none of these.

    Example:
        >>> from torch import nn
        >>> from lightning_attr.outputs import Regression
        >>> layer, x, y = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]]), torch.zeros(1)
        >>> hooks = HookedGradients(layer, ["weight"], direct=())
        >>> batch = fisher_batch(hooks, lambda: (layer(x), y), Regression(), [0], labels="exact")
        >>> for stream in batch.streams:
        ...     _ = stream(lambda gradients: print(gradients["weight"].materialise().round()))
        tensor([[[-1., -2.]]])
    """
    if labels not in get_args(Labels):
        raise ValueError(f"Expected argument `labels` to be one of {', '.join(get_args(Labels))}, but got {labels!r}.")
    size = len(rows)

    def loss(other: Callable[[Any, Any], tuple[Tensor, Tensor]] | None = None) -> Tensor:
        outputs, targets = step()
        if other is None:
            return model_output.loss(outputs, targets)
        with torch.no_grad():
            weights, targets = other(outputs, targets)
        losses = model_output.loss(outputs, targets)
        return losses * weights.sqrt().to(losses)

    def sampled(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        drawn = sample(model_output.distribution(outputs, targets), rows, "labels", *key)
        return torch.ones(()), model_output.relabelled(targets, drawn)

    if labels == "exact":
        with torch.no_grad():
            nodes = quadrature(model_output.distribution(*step()), size)
        forwards = [partial(loss, lambda *_, node=node: node) for node in nodes]
    else:
        forwards = [partial(loss, None if labels == "observed" else sampled)]
    return GradientBatch([partial(gradients, forward, size) for forward in forwards], size)


def sample(distribution: Distribution, rows: Sequence[int], *key: object) -> Tensor:
    """Draw from each sample's distribution by its inverse, so that a draw depends on the row and the key alone.

    Args:
        distribution: categorical, Bernoulli or normal, over one or more values of each of ``b`` samples.
        rows: dataset row of each sample.
        key: what the draws depend on besides.

    Returns:
        The draws, ``(b, ...)``: int64 of a categorical distribution, else float.

    Raises:
        TypeError: if the distribution is another one.

    Example:
        >>> certain = Categorical(probs=torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
        >>> sample(certain, [0, 1], 0)
        tensor([1, 0])
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
    cumulative = probabilities.cumsum(-1)
    below = cumulative <= uniforms.unsqueeze(-1) * cumulative[..., -1:]
    return below.sum(-1).clamp(max=cumulative.shape[-1] - 1)


def quadrature(distribution: Distribution, samples: int) -> list[tuple[Tensor, Tensor]]:
    r"""List labels and weights whose sum is the exact expectation of a gradient's outer product.

    All labels of a discrete distribution; of a normal one, with a loss quadratic in the label, a step along each
    of the ``r`` values of a sample, :math:`\mu + \sqrt{r} \sigma e_k` with the weight :math:`1 / r`.

    Args:
        distribution: categorical or Bernoulli over one value of each of ``b`` samples, or normal over ``r``.
        samples: ``b``.

    Returns:
        ``(weights, labels)``, ``(b,)`` and as the targets, for each label.

    Raises:
        TypeError: if the distribution is another one.
        ValueError: if there are several discrete values a sample, whose combinations are too many.

    Example:
        >>> quadrature(Bernoulli(probs=torch.tensor([0.25])), 1)
        [(tensor([0.7500]), tensor([0.])), (tensor([0.2500]), tensor([1.]))]
    """
    shape = distribution.batch_shape
    if isinstance(distribution, Normal):
        values = shape.numel() // samples
        steps = torch.eye(values).to(distribution.loc).mul(math.sqrt(values)).reshape(values, 1, *shape[1:])
        weight = torch.full((samples,), 1 / values).to(distribution.loc)
        return [(weight, distribution.loc + distribution.scale * step) for step in steps]
    if shape.numel() != samples:
        raise ValueError(
            f'Expected one target a sample for `labels="exact"`, but got {tuple(shape)} for {samples} samples: their '
            'combinations are too many. Pass `labels="sampled"`.'
        )
    support = _discrete(distribution).enumerate_support()  # type: ignore[no-untyped-call]
    return [(distribution.log_prob(label).exp().reshape(samples), label) for label in support]


def _discrete(distribution: Distribution) -> Bernoulli | Categorical:
    if not isinstance(distribution, (Bernoulli, Categorical)):
        raise TypeError(
            "Expected `model_output.distribution` to return a Categorical, Bernoulli or Normal of "
            f"torch.distributions, but got {type(distribution).__name__}."
        )
    return distribution
