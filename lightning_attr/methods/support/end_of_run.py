"""Outputs of the targets at the end of a replayed run, as functions of its parameters and running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lightning_attr.features.featurizer import AttributionPlan
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.gradients.functional import call_with
from lightning_attr.replay.running_statistics import UsedStatistics
from lightning_attr.replay.state import RunState, floating


def target_adjoints(model: SnapshotModel, end: RunState, rows: Sequence[int]) -> list[RunState]:
    """Differentiate the outputs of targets by the state that a run ends in.

    Returns one adjoint for each target of ``rows``, in their order.
    """
    plan = model.target_plan or model.plan
    return [
        adjoint
        for numbers, batch in model.target_batches(rows)
        for adjoint in batch_adjoints(model, plan, end, numbers, batch)
    ]


def batch_adjoints(
    model: SnapshotModel, plan: AttributionPlan, end: RunState, rows: Sequence[int], samples: Any
) -> list[RunState]:
    """Differentiate the outputs of a batch by the state that a run ends in.

    Returns one adjoint for each sample.
    """
    batch = model.completed(rows, samples)
    trained = [name for name, p in model.module.named_parameters() if p.requires_grad]
    leaves = {name: end.parameters[name].detach().requires_grad_() for name in trained}
    used = {name: buffer.detach().requires_grad_() for name, buffer in floating(end.buffers).items()}
    places = {**end.parameters, **leaves, **{name: buffer.detach() for name, buffer in end.buffers.items()}}
    run = partial(plan.objective.sample_outputs, batch_size=len(rows))
    with torch.enable_grad(), model.precision(), UsedStatistics(model.module, {**end.buffers, **used}):
        outputs = list(call_with(model.module, places, run, batch))
    found = []
    for output in outputs:
        slopes = torch.autograd.grad(
            output, [*leaves.values(), *used.values()], retain_graph=True, materialize_grads=True, allow_unused=True
        )
        pairs = dict(zip([*leaves, *used], slopes, strict=True))
        of_buffers = {name: pairs.pop(name) for name in used}
        found.append(RunState.adjoint(pairs, of_buffers, end))
    return found
