"""One batch of each snapshot against autograd: some of its samples, weighted at random, without those beside them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_attr.batches.float64 import doubled
from lightning_attr.batches.nested import select_rows
from lightning_attr.batches.samples_apart import SamplesApart
from lightning_attr.errors import BatchDependenceError
from lightning_attr.features.featurizer import Featurizer
from lightning_attr.gradients.functional import densely
from lightning_attr.gradients.plain_execution import plain_execution
from lightning_attr.objectives.objective import completed, draws_of
from lightning_attr.parameters.layout import as_pairs
from lightning_attr.projectors import Projection
from lightning_attr.randomness.draws import Draw

_SAMPLES = 4
"""Of a batch: one forward and backward pass of so few is less than a percent of featurizing a thousand."""


def check_features(featurizer: Featurizer, batch: Any, rows: Sequence[int], features: Tensor) -> None:
    """Compare features of a batch with autograd on a few of its samples, taken from it.

    A random combination of their outputs is differentiated at once, in all parameters, and projected: one number a
    feature. What differs depends on the samples beside, or on a path that the check of the module did not see.

    Shapes: features (b, dim).
    """
    projection, plan = featurizer.projection, featurizer.plan
    linear = type(projection).finish is Projection.finish
    # Samples that go through one by one are differentiated by autograd, or have no output that could be computed twice.
    if projection.dim == 0 or not linear or plan.seeded or isinstance(batch, SamplesApart):
        return
    chosen = sorted(
        random.Random(f"{featurizer.snapshot} {rows[0]}").sample(range(len(rows)), min(_SAMPLES, len(rows)))
    )
    generator = torch.Generator().manual_seed(len(rows))
    weights = torch.randn(len(chosen), generator=generator, dtype=torch.float64).to(features.device, features.dtype)
    expected, norm = _projected(featurizer, select_rows(batch, len(rows), chosen), [rows[i] for i in chosen], weights)
    found = features[chosen]
    size = (weights.square() @ doubled(found).square().sum(1).to(weights)).sqrt()
    difference = (expected - weights @ found).norm()
    # Where a projection takes next to all of a gradient away, what is left is its rounding.
    noise = 64 * torch.finfo(features.dtype).eps * norm
    if difference > _tolerance(featurizer, features) * size + noise + 1e-12:
        named = ", ".join(f"dataset[{rows[i]}]" for i in chosen)
        raise BatchDependenceError(
            f"The features of {named}, computed in a batch of {len(rows)}, differ from the gradients of these samples "
            f"alone by {100 * (difference / size).item():.2g} % of their size: what {type(featurizer.module).__name__} "
            "computes for a sample changes with the samples beside it in a batch of this size. Look for comparisons "
            "and statistics within the batch, losses that are divided by something of the whole batch, and layers that "
            "see other samples together than when the module was checked."
        )


def _projected(featurizer: Featurizer, batch: Any, rows: Sequence[int], weights: Tensor) -> tuple[Tensor, float]:
    """Project the gradient of a weighted sum of outputs, ``(dim,)``; beside it, the norm of that gradient."""
    module, objective = featurizer.module, featurizer.plan.objective
    names = {*featurizer.plan.hooked, *featurizer.plan.fallback}
    wanted = featurizer.projection.names
    params = {n: p for n, p in module.named_parameters() if n in names and (wanted is None or n in wanted)}
    total, count = weights.new_zeros(()), draws_of(module)
    with torch.enable_grad(), plain_execution():
        for number in range(count):
            drawn = Draw([row + featurizer.first_row for row in rows], featurizer.snapshot, number, weights.device)
            given = completed(module, batch, drawn)
            total = total + (weights * objective.sample_outputs(given, len(rows))).sum() / count
        if not total.requires_grad or not params:  # the projection may leave every parameter out
            return weights.new_zeros(featurizer.projection.dim), 0.0
        gradients = torch.autograd.grad(total, list(params.values()), allow_unused=True)
    room = torch.zeros(1, featurizer.projection.dim, dtype=featurizer.dtype, device=weights.device)
    known = [(name, densely(g)) for name, g in zip(params, gradients, strict=True) if g is not None]
    norm = math.sqrt(sum(doubled(gradient.abs()).square().sum().item() for _, gradient in known))
    with featurizer.projection.filling(room) as add:
        add({name: as_pairs(gradient.unsqueeze(0)).to(featurizer.dtype) for name, gradient in known})
    return room[0], norm


def _tolerance(featurizer: Featurizer, features: Tensor) -> float:
    """The share that rounding may change: gross differences are looked for."""
    if torch.is_autocast_enabled(features.device.type):
        return 0.2
    low = any(torch.finfo(p.dtype).bits < 32 for p in featurizer.module.parameters())
    return 0.2 if low else 1e-6 if features.dtype == torch.float64 else 1e-2 if features.device.type == "cpu" else 5e-2
