"""One optimizer step of a run: forwards, as training made it, and backwards, for what depends on its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_attr.errors import AttributionError
from lightning_attr.replay.optimizer_forms import Clipping, GroupForm, updated
from lightning_attr.replay.state import RunState, floating


class Evaluated(NamedTuple):
    """A training loss at some parameters and buffers.

    Args:
        loss: as the training step returned it, ``()``.
        shares: what each sample puts into it, ``(b,)``; None where that was not asked for.
        buffers: name -> buffer after the step; those with derivatives have their graph where shares were asked for.
    """

    loss: Tensor
    shares: Tensor | None
    buffers: dict[str, Tensor]


class MicroBatch(Protocol):
    """A batch of a run, with the random numbers that it had."""

    @property
    def rows(self) -> Tensor:
        """Data set row of each sample, ``(b,)``, int64."""

    def evaluate(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], apart: bool) -> Evaluated:
        """Compute the training loss, the same each time; with ``apart``, the shares of the samples as well."""


@dataclass(frozen=True)
class ReplayStep:
    """One optimizer step.

    Args:
        number: optimizer steps taken before it.
        batches: those whose gradients it adds up.
        divisor: of each of their losses.
        groups: how the optimizer updates the parameters.
        clipping: of the sum of the gradients.
    """

    number: int
    batches: Sequence[MicroBatch]
    divisor: float
    groups: tuple[GroupForm, ...]
    clipping: Clipping | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that the step may change."""
        return tuple(name for form in self.groups for name in form.names)


class Trace(NamedTuple):
    """What going back through a step needs of having gone forwards.

    Args:
        before: the state that it met.
        gradients: parameter name -> gradient before clipping, of those that had one.
        buffers: the buffers that each micro-batch met.
        losses: of the micro-batches.
    """

    before: RunState
    gradients: dict[str, Tensor]
    buffers: tuple[dict[str, Tensor], ...]
    losses: tuple[float, ...]


def advance(step: ReplayStep, state: RunState, weights: Tensor | None = None) -> tuple[RunState, Trace]:
    """Take a step, with other weights than one of the samples where ``weights``, ``(n,)``, has them.

    Returns the state after it, and what going back needs.
    """
    leaves = {name: state.parameters[name].detach().requires_grad_() for name in step.names}
    buffers, met, losses = state.buffers, [], []
    gradients: dict[str, Tensor] = {}
    for batch in step.batches:
        met.append(buffers)
        found = batch.evaluate({**state.parameters, **leaves}, buffers, apart=weights is not None)
        with torch.enable_grad():
            loss = found.loss
            if weights is not None and found.shares is not None:
                loss = loss + ((weights[batch.rows].to(loss) - 1) * found.shares).sum()
            loss = loss / step.divisor
        each = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, each, strict=True):
            if gradient is not None:
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        buffers = {name: tensor.detach() for name, tensor in found.buffers.items()}
        losses.append(found.loss.item())
    with torch.no_grad():
        after = updated(state, gradients, step.groups, step.clipping)
    return after._replace(buffers=buffers), Trace(state, gradients, tuple(met), tuple(losses))


def go_back(
    step: ReplayStep, trace: Trace, adjoints: Sequence[RunState], scores: Tensor, hessian: str = "exact"
) -> list[RunState]:
    r"""Go back through a step: by the chain rule, from the adjoints of the state after it to those of that before.

    .. math::
        \frac{d f}{d w_z} \mathrel{+}= \lambda_g^\top \frac{\partial g}{\partial w_z}, \qquad
        \lambda_\theta \leftarrow \lambda_\theta' + \nabla^2 L\, \lambda_g, \qquad
        g = \nabla_\theta \sum_z w_z s_z

    with the shares :math:`s_z` of the samples in the loss, and :math:`\lambda_g`, :math:`\lambda_\theta'` the adjoints
    of gradient and parameters behind clipping and optimizer. The first is added to ``scores``. In place of the exact
    Hessian there may be "gram", the sum of outer products of the samples' gradients, or "none".

    Shapes: scores (n, m), with an adjoint for each output. Returns the adjoints before the step.
    """
    behind, slopes = _behind_gradients(step, trace, adjoints)
    for batch, buffers, loss in list(zip(step.batches, trace.buffers, trace.losses, strict=True))[::-1]:
        behind = _through_batch(step, batch, trace, buffers, loss, behind, slopes, scores, hessian)
    return behind


def _behind_gradients(
    step: ReplayStep, trace: Trace, adjoints: Sequence[RunState]
) -> tuple[list[RunState], list[dict[str, Tensor]]]:
    """Go back through optimizer and clipping: adjoints of state and gradient."""
    given = [{name: t.detach().requires_grad_() for name, t in part.items()} for part in _moving(trace.before)]
    gradients = {name: g.detach().requires_grad_() for name, g in trace.gradients.items()}
    state = trace.before._replace(parameters=given[0], first=given[1], second=given[2])
    with torch.enable_grad():
        after = _moving(updated(state, gradients, step.groups, step.clipping))
    inputs = [t for part in (*given, gradients) for t in part.values()]
    outputs = [t for part in after for t in part.values()]
    parts = [_moving(adjoint) for adjoint in adjoints]
    cotangents = [
        torch.stack([moving[number][name] for moving in parts]) for number, own in enumerate(after) for name in own
    ]
    together = torch.autograd.grad(outputs, inputs, cotangents, is_grads_batched=True, materialize_grads=True)
    behind, slopes = [], []
    for place, adjoint in enumerate(adjoints):
        found = iter(together)
        own = [{name: next(found)[place] for name in part} for part in (*given, gradients)]
        behind.append(adjoint._replace(parameters=own[0], first=own[1], second=own[2]))
        slopes.append(own[3])
    return behind, slopes


def _moving(state: RunState) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    return state.parameters, state.first, state.second


def _through_batch(
    step: ReplayStep,
    batch: MicroBatch,
    trace: Trace,
    buffers: Mapping[str, Tensor],
    loss: float,
    adjoints: Sequence[RunState],
    slopes: Sequence[Mapping[str, Tensor]],
    scores: Tensor,
    hessian: str,
) -> list[RunState]:
    """Go back through the gradient of a micro-batch, and the buffers that it leaves."""
    given = trace.before.parameters
    parameters = {name: given[name].detach().requires_grad_() for name in step.names}
    met = {name: tensor.detach().requires_grad_() for name, tensor in floating(buffers).items()}
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        found = batch.evaluate({**given, **parameters}, {**buffers, **met}, apart=True)
        assert found.shares is not None  # asked for
        _check_same(step, loss, found.loss)
        weights = torch.ones_like(found.shares).requires_grad_()
        total = (found.loss + ((weights - 1) * found.shares).sum()) / step.divisor
        each = torch.autograd.grad(total, list(parameters.values()), create_graph=True, allow_unused=True)
        of_parameters = {name: g for name, g in zip(parameters, each, strict=True) if g is not None and g.requires_grad}
    of_buffers = {name: tensor for name, tensor in floating(found.buffers).items() if tensor.requires_grad}
    inputs = [weights, *met.values(), *(parameters.values() if hessian == "exact" else ())]
    result = []
    for number, (adjoint, slope) in enumerate(zip(adjoints, slopes, strict=True)):
        outputs = [*of_parameters.values(), *of_buffers.values()]
        cotangents = [*(slope[name] for name in of_parameters), *(adjoint.buffers[name] for name in of_buffers)]
        back = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, materialize_grads=True)
        scores[:, number].index_add_(0, batch.rows.to(scores.device), back[0].to(scores))
        own = dict(zip(met, back[1:], strict=False))
        if hessian == "exact":
            products = back[1 + len(met) :]
        elif hessian == "gram":  # sum_z g_z (g_z . slope) b / divisor, with the shares g_z / b
            with torch.enable_grad():
                sums = (len(weights) / step.divisor * back[0] * found.shares).sum()
            products = torch.autograd.grad(
                sums, list(parameters.values()), retain_graph=True, materialize_grads=True, allow_unused=True
            )
        else:
            products = ()
        moved = dict(adjoint.parameters)
        for name, product in zip(parameters, products, strict=False):
            moved[name] = moved[name] + product
        result.append(adjoint._replace(parameters=moved, buffers=own))
    return result


def _check_same(step: ReplayStep, before: float, again: Tensor) -> None:
    """Refuse a step whose loss is another when it is computed again: its derivative would be that of another step."""
    if abs(again.item() - before) > 1e-3 * max(abs(before), abs(again.item()), 1e-12):
        raise AttributionError(
            f"The training loss of step {step.number} was {before:.6g} when the run was replayed, and "
            f"{again.item():.6g} when its derivative was taken, from the same weights, samples and random state: the "
            "training step is not deterministic. Look for random numbers from generators of its own, or operations "
            "without a deterministic form (torch.use_deterministic_algorithms names them)."
        )
