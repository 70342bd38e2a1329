"""Representer points of the last linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_attr.arguments.checks import check_choice, check_flag, check_float
from lightning_attr.errors import AttributionError
from lightning_attr.features.snapshot_model import Batches, SnapshotModel
from lightning_attr.methods.base import ScoreBlock, SnapshotFeatures
from lightning_attr.methods.cache import CacheKey
from lightning_attr.methods.support.layer_observation import (
    Observation,
    check_layer_name,
    class_labels,
    observe,
    observed,
    refuse_target_function,
)
from lightning_attr.methods.support.module_method import ModelMethod, model_of
from lightning_attr.outputs import Regression

_TOLERANCE = 1e-8
"""Norm of the gradient at which the head counts as fitted."""
_MOST_STEPS = 100
_MOST_PRODUCTS = 500


_HEAD_INPUTS: CacheKey[list[tuple[_HeadInput, Tensor]]] = CacheKey("head inputs")


class RPS(ModelMethod):
    r"""Representer point selection with a ridge (Yeh et al., 2018): which training samples make up a logit.

    The last linear layer, on features :math:`h_i` (with a 1 appended if it has a bias), is fitted again to the
    probabilities :math:`\bar y_i` that the model itself gives,

    .. math::
        W^* = \arg\min_W \rho \|W\|^2 + \tfrac1n \sum_i \mathrm{CE}(W h_i, \bar y_i),

    at which it is a sum over the training samples: :math:`W^* = \sum_i \alpha_i h_i^\top` with :math:`\alpha_i =
    (\bar y_i - p_i) / (2 \rho n)`. The score of a sample is its share in the logit of the target's class,
    :math:`\alpha_{i c} \, h_i \cdot h_j`; positive where it excites that logit. Only their order means something: they
    explain the fitted head, not what leaving a sample out would do.

    For a module with one output (:class:`lightning_attr.outputs.BinaryMargin`) the probabilities are sigmoids, and the
    logit of class 0 is the negative one. The problem is convex, and solved by Newton steps with conjugate gradients, in
    float64 and from the trained weights, to a gradient of norm 1e-8. The features of this process's training samples
    stay in memory.

    Args:
        l2: :math:`\rho`.
        layer: name of the last linear layer; by default it is found: the last one that the forward pass calls.
        target_class: "label" for the class that a target is labelled with, "prediction" for the one that the model
            gives it. Self-influence takes that of the training sample.
        normalize: the cosine of the features instead of their inner product.
        snapshots: "last" for the last snapshot, "all" for all of them, each with an equal part.

    Raises:
        ValueError: if an argument is not one of these.

    Example:
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, nn.Sequential): ...
        >>> _ = torch.manual_seed(0)
        >>> batch = (torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]))
        >>> model = SnapshotModel.of(Classifier(nn.Linear(2, 2)).eval(), [batch], [batch])
        >>> (block,) = RPS().score([SnapshotFeatures.at(model, {})])
        >>> block.scores.shape, torch.equal(block.scores.diagonal(), block.self_influence)
        (torch.Size([3, 3]), True)
    """

    scale = "rank_only"

    def __init__(
        self,
        l2: float = 3e-3,
        layer: str | None = None,
        target_class: str = "label",
        normalize: bool = False,
        snapshots: str = "last",
    ) -> None:
        super().__init__(snapshots)
        check_choice(self, "target_class", target_class, ("label", "prediction"))
        self.l2 = check_float(self, "l2", l2, above=0)
        self.layer = check_layer_name(self, layer)
        self.target_class = target_class
        self.normalize = check_flag(self, "normalize", normalize)

    def score_snapshot(self, snapshot: SnapshotFeatures) -> Iterator[ScoreBlock]:
        """Fit the head once, then weigh inner products; see :meth:`ModelMethod.score_snapshot`.

        Args:
            snapshot: with its model.

        Yields:
            Blocks of rows.

        Raises:
            AttributionError: if the fit does not converge, or a function of the targets is to be measured.
            TypeError: if the module has no logits.
            ValueError: if the last linear layer does not give the logits, or there are no class labels.
        """
        model = model_of(snapshot)
        refuse_target_function(model, "RPS")
        inputs = snapshot.cache.once(_HEAD_INPUTS, lambda: self._weighted(model))
        parts = list(self._inputs(model, model.target_batches(snapshot.target_rows)))
        for block, alpha in inputs:
            own = self._classes(block)
            own_influence = alpha.gather(1, own[:, None]).squeeze(1) * self._scaled(block.features).square().sum(1)
            scores = [
                alpha[:, self._classes(part)] * (self._scaled(block.features) @ self._scaled(part.features).T)
                for part in parts
            ]
            both = (torch.cat(scores, 1) if scores else alpha[:, :0]).to("cpu", model.dtype)
            yield ScoreBlock(range(block.rows[0], block.rows[-1] + 1), both, own_influence.to("cpu", model.dtype))

    def _weighted(self, model: SnapshotModel) -> list[tuple[_HeadInput, Tensor]]:
        """Training samples as the head sees them, each with its representer values."""
        blocks = list(self._inputs(model, model.train_batches()))
        weight = self._fit(model, blocks)
        return [(block, self._alpha(model, block, weight)) for block in blocks]

    def _inputs(self, model: SnapshotModel, batches: Batches) -> Iterator[_HeadInput]:
        for rows, values in observed(model, batches, lambda seen: _head_input(model, seen), self.layer):
            yield _HeadInput(rows, values["features"].double(), values["logits"].double(), values["labels"])

    def _fit(self, model: SnapshotModel, blocks: Sequence[_HeadInput]) -> Tensor:
        rows, batch = next(iter(model.target_batches(range(1))))  # a process may have no training samples
        seen = observe(model, model.completed(rows, batch), len(rows), self.layer)
        _head_input(model, seen)
        assert isinstance(seen.layer, nn.Linear)
        start = _trained(model, seen.layer)

        def fit() -> dict[str, Tensor]:
            features, logits = [block.features for block in blocks], [block.logits for block in blocks]
            return {"weight": fit_head(features, logits, start, self.l2, model.n_train, model.reduce)}

        kept = model.kept(f"representer-{self.layer}-l2={self.l2}", fit, {"weight": tuple(start.shape)})
        return kept["weight"].to(model.device)

    def _alpha(self, model: SnapshotModel, block: _HeadInput, weight: Tensor) -> Tensor:
        """Weights of the samples in the logit of each class, ``(b, c)``; c = 2 for one output."""
        residual = _probabilities(block.logits) - _probabilities(block.features @ weight.T)
        alpha = residual / (2 * self.l2 * model.n_train)
        return torch.cat([-alpha, alpha], 1) if alpha.shape[1] == 1 else alpha

    def _classes(self, block: _HeadInput) -> Tensor:
        if self.target_class == "label":
            return block.labels
        return (block.logits[:, 0] > 0).long() if block.logits.shape[1] == 1 else block.logits.argmax(1)

    def _scaled(self, features: Tensor) -> Tensor:
        return normalize(features) if self.normalize else features


@dataclass(frozen=True)
class _HeadInput:
    """A batch at the last layer: ``features`` ``(b, d)`` with the 1, ``logits`` ``(b, c)``, ``labels`` ``(b,)``."""

    rows: Sequence[int]
    features: Tensor
    logits: Tensor
    labels: Tensor


def _head_input(model: SnapshotModel, seen: Observation) -> dict[str, Tensor]:
    logits = _logits(model, seen)
    labels = class_labels(seen.targets, len(logits))
    if labels is None:
        raise ValueError(
            f"RPS explains the logits of a classifier, with one class label a sample, but the targets of "
            f"{type(model.module).__name__} are not labels of shape ({len(logits)},). Use RepresentationSimilarity, or "
            "a method of gradients."
        )
    assert isinstance(seen.layer, nn.Linear)  # or its output were not the logits
    features = seen.input
    if seen.layer.bias is not None:
        features = torch.cat([features, features.new_ones(len(features), 1)], 1)
    return {"features": features, "logits": logits, "labels": labels}


def _logits(model: SnapshotModel, seen: Observation) -> Tensor:
    """Outputs of the module as logits ``(b, c)`` at temperature 1, if the layer gives them."""
    name, b = type(model.module).__name__, len(seen.input)
    if seen.outputs is None:
        raise TypeError(
            f"RPS needs the logits of {name}, but it has only a training step. Put lightning_attr.AttributionMixin "
            "among its bases."
        )
    model_output = model.module.model_output
    if isinstance(model_output, Regression) or not isinstance(seen.outputs, Tensor) or seen.outputs.ndim > 2:
        raise ValueError(
            f"RPS explains the logits of a classifier, of shape (b, c) or (b,), but the model output of {name} is "
            f"{type(model_output).__name__}, and its outputs are "
            f"{tuple(seen.outputs.shape) if isinstance(seen.outputs, Tensor) else type(seen.outputs).__name__}."
        )
    logits = seen.outputs.detach().reshape(b, -1)
    plain = isinstance(seen.layer, nn.Linear) and type(seen.layer).forward is nn.Linear.forward
    if not plain or not torch.equal(seen.output.reshape(b, -1).to(logits.dtype), logits):
        linear = [repr(n) for n, inner in model.module.named_modules() if isinstance(inner, nn.Linear)]
        raise ValueError(
            f"Expected the outputs of {name} to be those of its last linear layer, but the layer {seen.name!r} gives "
            f"something else. Name another `layer` ({', '.join(linear)}), or return the logits themselves from "
            "`attribution_step`."
        )
    return logits / _temperature(model)


def _trained(model: SnapshotModel, layer: nn.Linear) -> Tensor:
    """Weights of the layer with the bias as the last column, ``(c, d)``, float64."""
    bias = [] if layer.bias is None else [layer.bias.detach()[:, None]]
    return torch.cat([layer.weight.detach(), *bias], 1).double() / _temperature(model)


def _temperature(model: SnapshotModel) -> float:
    return getattr(model.module.model_output, "temperature", 1.0)


def fit_head(
    features: Sequence[Tensor],
    logits: Sequence[Tensor],
    start: Tensor,
    l2: float,
    n_train: int,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    r"""Minimise :math:`\rho \|W\|^2 + \tfrac1n \sum_i \mathrm{CE}(W h_i, \bar y_i)` for the probabilities of logits.

    Newton steps whose systems are solved by conjugate gradients (Nocedal and Wright, 2006, algorithm 7.1), as far as
    pays: L-BFGS needs ten times the time where the ridge is small, and stops short of the tolerance.

    Shapes: features (b, d), logits (b, c), start (c, d). Returns ``(c, d)``, float64, the same in all processes.
    """
    soft = [_probabilities(block) for block in logits]

    def at(weight: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = start.new_zeros(1), torch.zeros_like(start)
        for h, y in zip(features, soft, strict=True):
            scores = h @ weight.T
            loss += _cross_entropy(scores, y)
            gradient += (_probabilities(scores) - y).T @ h
        summed = reduce(torch.cat([loss, gradient.flatten()])) / n_train
        return summed[0] + l2 * weight.square().sum(), summed[1:].view_as(start) + 2 * l2 * weight

    def curvature(weight: Tensor) -> Callable[[Tensor], Tensor]:
        probabilities = [_probabilities(h @ weight.T) for h in features]

        def product(direction: Tensor) -> Tensor:
            total = torch.zeros_like(start)
            for h, p in zip(features, probabilities, strict=True):
                pushed = p * (h @ direction.T)
                total += (pushed - p * pushed.sum(1, keepdim=True)).T @ h
            return reduce(total) / n_train + 2 * l2 * direction

        return product

    weight = start
    loss, gradient = at(weight)
    for _ in range(_MOST_STEPS):
        if gradient.norm() <= _TOLERANCE:
            return weight
        step = _solve(curvature(weight), -gradient)
        decrease, length = -float((gradient * step).sum()), 1.0
        while True:  # differences below the rounding of the loss count as none
            tried = weight + length * step
            new_loss, new_gradient = at(tried)
            if new_loss <= loss - 1e-4 * length * decrease + 1e-14 * loss.abs() or length < 1e-10:
                break
            length /= 2
        weight, loss, gradient = tried, new_loss, new_gradient
    raise AttributionError(
        f"The last layer could not be fitted: the gradient has the norm {float(gradient.norm()):.1e} after "
        f"{_MOST_STEPS} Newton steps, not {_TOLERANCE:.0e}. Raise `l2` (here {l2:g})."
    )


def _solve(product: Callable[[Tensor], Tensor], rhs: Tensor) -> Tensor:
    """Solve roughly by conjugate gradients: the closer to the minimum, the better."""
    solution, residual = torch.zeros_like(rhs), rhs
    direction, square = rhs, float(rhs.square().sum())
    least = square * min(0.25, square**0.5)
    for _ in range(_MOST_PRODUCTS):
        curved = product(direction)
        size = square / float((direction * curved).sum())
        solution, residual = solution + size * direction, residual - size * curved
        new = float(residual.square().sum())
        if new <= least:
            break
        direction, square = residual + new / square * direction, new
    return solution


def _probabilities(logits: Tensor) -> Tensor:
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def _cross_entropy(logits: Tensor, soft: Tensor) -> Tensor:
    """Sum over the samples, ``()``."""
    if logits.shape[1] == 1:
        return nn.functional.binary_cross_entropy_with_logits(logits, soft, reduction="sum")
    return nn.functional.cross_entropy(logits, soft, reduction="sum")
