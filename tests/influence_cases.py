"""Small problems for influence functions whose answer is known: by refitting, or with every matrix written out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from threading import Barrier, Lock
from typing import Any

import torch
from torch import Tensor, nn

from cases import blobs
from lightning_attr import AttributionMixin
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods import AttributionMethod, SnapshotFeatures
from lightning_attr.outputs import BinaryMargin, Regression

N, M, P = 24, 4, 5
Batch = tuple[Tensor, Tensor]


class Line(AttributionMixin, nn.Linear):
    model_output = Regression()


class Logistic(AttributionMixin, nn.Linear):
    model_output = BinaryMargin()


class Network(AttributionMixin, nn.Sequential):
    """A small MLP for three classes."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batches(data: Batch, size: int) -> list[Batch]:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def snapshot(module: Any, train: Batch, targets: Batch, batch_size: int = 7, **more: Any) -> SnapshotFeatures:
    model = SnapshotModel.of(module.eval(), batches(train, batch_size), batches(targets, 3))
    for name, value in more.items():
        object.__setattr__(model, name, value)
    return SnapshotFeatures.at(model, {})


def scored(method: AttributionMethod, features: SnapshotFeatures) -> tuple[Tensor, Tensor]:
    blocks = list(method.score([features]))
    return torch.cat([block.scores for block in blocks]), torch.cat([block.self_influence for block in blocks])


def network(dtype: torch.dtype = torch.float64) -> tuple[Network, Batch, Batch]:
    """An untrained network, which has gradients everywhere."""
    x, y = blobs(N).tensors
    targets, labels = blobs(M, seed=1).tensors
    return Network().to(dtype), (x.to(dtype), y), (targets.to(dtype), labels)


def gradients(module: nn.Module, values: Callable[[Any], Tensor], data: Batch) -> Tensor:
    """Gradients of ``values(batch)`` of one sample after the other, ``(b, p)``."""
    rows = []
    for x, y in zip(*data, strict=True):
        found = torch.autograd.grad(values((x[None], y[None])).sum(), list(module.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def dense_curvature(module: Any, kind: str, data: Batch) -> Tensor:
    """The mean curvature of the training loss with every matrix written out, from plain autograd, ``(p, p)``."""
    if kind == "empirical_fisher":
        g = gradients(module, lambda b: module.model_output.loss(*module.attribution_step(b)), data)
        return g.T @ g / len(g)
    names = [name for name, _ in module.named_parameters()]
    shapes = [p.shape for p in module.parameters()]
    theta = torch.cat([p.detach().flatten() for p in module.parameters()])

    def at(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    def outputs(flat: Tensor) -> Tensor:
        return torch.func.functional_call(module, at(flat), (data[0],))

    def loss(z: Tensor) -> Tensor:
        return module.model_output.loss(z, data[1]).mean()

    if kind == "hessian":
        return torch.autograd.functional.hessian(lambda flat: loss(outputs(flat)), theta)
    jacobian = torch.autograd.functional.jacobian(outputs, theta).flatten(0, -2)
    bend = torch.autograd.functional.hessian(loss, outputs(theta).detach()).reshape(len(jacobian), -1)
    return jacobian.T @ bend @ jacobian


def expected_scores(
    module: Any, train: Batch, targets: Batch, curvature: Tensor, damping: float, decay: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Scores and self-influence from the definition, with a dense damped curvature."""

    def output(batch: Batch) -> Tensor:
        return module.model_output.output(*module.attribution_step(batch))

    p = len(curvature)
    damped = curvature + (damping * curvature.trace() / p + decay) * torch.eye(p).to(curvature)
    losses = gradients(module, lambda b: module.model_output.loss(*module.attribution_step(b)), train)
    inverse = torch.linalg.inv(damped)
    scores = -losses @ inverse @ gradients(module, output, targets).T / len(losses)
    own = -losses @ inverse @ gradients(module, output, train).T / len(losses)
    return scores, own.diagonal()


def shares(module: Any, train: Batch, targets: Batch, kept: Sequence[Sequence[int]], batch_size: int = 4) -> Any:
    """One model a process, each with some batches of the training samples, and a sum that needs all of them."""
    barrier, lock, total = Barrier(len(kept)), Lock(), {}

    def reduce(tensor: Tensor) -> Tensor:
        with lock:
            total["sum"] = total["sum"] + tensor if "sum" in total else tensor.clone()
        barrier.wait()
        tensor.copy_(total["sum"])
        if barrier.wait() == 0:
            total.clear()
        barrier.wait()
        return tensor

    found = []
    for own in kept:
        features = snapshot(copy.deepcopy(module), train, targets, batch_size)
        numbered = list(features.model.train_batches())
        object.__setattr__(features.model, "train_batches", lambda own=own, all=numbered: iter([all[i] for i in own]))
        object.__setattr__(features.model, "reduce", reduce)
        found.append(features)
    return found
