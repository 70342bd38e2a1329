"""From a batch to rows of the store: model output, its per-sample gradient, projected, and the values beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_attr.batches.late_checks import late_checks
from lightning_attr.batches.nested import plain_tensors, select_rows
from lightning_attr.batches.samples_apart import SamplesApart
from lightning_attr.data.memory import MemoryBudget
from lightning_attr.errors import named_samples
from lightning_attr.features.failing_samples import named_failures
from lightning_attr.features.finite import check_finite
from lightning_attr.gradients import (
    GradientPlan,
    HookedGradients,
    loop_gradients,
    plan_gradients,
    vmap_gradients,
)
from lightning_attr.gradients.full_precision import full_precision
from lightning_attr.gradients.hooks import LayerSink
from lightning_attr.gradients.mode_reads import watch_mode
from lightning_attr.gradients.plain_execution import plain_execution
from lightning_attr.gradients.rules import check_layers
from lightning_attr.gradients.whole_gradients import whole_gradients
from lightning_attr.objectives.apart import OutputApart, apart_objective
from lightning_attr.objectives.mode_choice import choose_mode, is_random
from lightning_attr.objectives.modes import MeanNoise, check_mode, in_mode, seeded, set_mode
from lightning_attr.objectives.objective import Objective, batch_objective, check_module, completed, draws_of, measured
from lightning_attr.parameters.layout import as_pairs, real_dtype
from lightning_attr.projectors import Projection
from lightning_attr.randomness.draws import Draw
from lightning_attr.randomness.streams import hashed_seed
from lightning_attr.user_code.isolation import preserved_rng

log = logging.getLogger(__name__)

PROBE_SIZE = 4
"""Samples with which a module is checked before anything is featurized."""


@dataclass(frozen=True)
class AttributionPlan(GradientPlan):
    """What is attributed, and the gradient path of each parameter.

    Args:
        objective: the model output or the training loss, of the module.
        mode: of the module, "eval" or "train".
        seeded: whether the module is random in that mode: each sample goes through on its own, with a seed of its own.

    Example:
        >>> from lightning_attr.objectives.objective import TrainingLoss
        >>> AttributionPlan(("weight",), (), True, TrainingLoss(None, "mean", captured=True)).objective
        TrainingLoss(reduction='mean', captured=True)
    """

    objective: Objective
    mode: str = field(default="eval", kw_only=True)
    seeded: bool = field(default=False, kw_only=True)


@full_precision()
def plan(module: Any, batch: Any, batch_size: int, mode: str | None = None) -> AttributionPlan:
    """Check a module on a few samples and choose the gradient path of each parameter.

    Returns the plan that :class:`Featurizer` follows.
    """
    check_module(module)
    batch = completed(module, batch, Draw(range(batch_size), device=_device(module)))
    check_mode(mode)
    if mode is not None:
        return _plan_in(mode, module, batch, batch_size)
    set_mode(module, "eval")
    check_layers(module)
    one = batch[0] if isinstance(batch, SamplesApart) else batch
    objective = None
    with watch_mode(module) as reads, torch.enable_grad():
        try:
            if one is batch:
                objective = batch_objective(module, batch, batch_size)
            else:
                measured(module, one)
        except Exception:  # what runs in train mode only is told from what does not run at all
            if not reads.seen:
                raise
    if reads.seen and choose_mode(module, one) == "train":
        try:
            return _plan_in("train", module, batch, batch_size)
        except Exception as error:
            name, kind = type(module).__name__, type(error).__name__
            log.warning("%s cannot be attributed in train mode (%s: %s): eval mode is tried.", name, kind, error)
    return _plan_in("eval", module, batch, batch_size, objective)


def _plan_in(
    mode: str, module: Any, batch: Any, batch_size: int, objective: Objective | None = None
) -> AttributionPlan:
    one = batch[0] if isinstance(batch, SamplesApart) else batch
    set_mode(module, mode)
    check_layers(module)
    noisy = mode == "train" and is_random(module, one)
    if isinstance(batch, SamplesApart):
        return _plan_apart(module, batch, mode, noisy)
    if noisy:
        return _plan_of_one(module, batch, batch_size)
    objective = objective or batch_objective(module, batch, batch_size)
    gradients = plan_gradients(
        module,
        lambda batch: objective.forward(batch, batch_size)[0],
        lambda params, batch: objective.functional_output(params, batch),
        batch,
        batch_size,
        lambda batch: objective.sample_outputs(batch, batch_size),
    )
    return AttributionPlan(**vars(gradients), objective=objective, mode=mode)


def apart_plan(plan: AttributionPlan) -> AttributionPlan:
    """Turn a plan into one of samples that are apart.

    Returns the plan: every parameter by plain autograd, one sample after the other.

    Example:
        >>> from lightning_attr.objectives.objective import TrainingLoss
        >>> apart_plan(AttributionPlan(("weight",), (), True, TrainingLoss(None, "mean", captured=True))).fallback
        ('weight',)
    """
    objective = plan.objective if isinstance(plan.objective, OutputApart) else OutputApart(plan.objective)
    names = (*plan.hooked, *plan.fallback)
    return AttributionPlan(
        (), names, vectorised=False, inner=True, objective=objective, mode=plan.mode, seeded=plan.seeded
    )


def _plan_apart(module: Any, batch: SamplesApart, mode: str, noisy: bool) -> AttributionPlan:
    """Plan for samples that are batches of their own: plain autograd, one after the other."""
    with preserved_rng(), in_mode(module, mode, dropout=not noisy), MeanNoise() if noisy else nullcontext():
        objective = apart_objective(module, batch)
    names = tuple(name for name, p in module.named_parameters() if p.requires_grad)
    return AttributionPlan((), names, vectorised=False, inner=True, objective=objective, mode=mode, seeded=noisy)


def _plan_of_one(module: Any, batch: Any, batch_size: int) -> AttributionPlan:
    """Plan for a module that is random in train mode: samples are compared without noise, gradients at one seed."""
    log.warning(
        "%s is random in train mode (dropout, noise): each sample goes through on its own, with random numbers of its "
        "own, which is slower.",
        type(module).__name__,
    )
    with preserved_rng(), in_mode(module, "train", dropout=False), MeanNoise():
        objective = batch_objective(module, batch, batch_size)
    seed = hashed_seed("mode", "probe")

    def at_seed(run: Callable[[], Tensor]) -> Tensor:
        with preserved_rng(), seeded(seed):
            return run()

    gradients = plan_gradients(
        module,
        lambda one: at_seed(lambda: objective.forward(one, 1)[0]),
        lambda params, one: at_seed(lambda: objective.functional_output(params, one)),
        select_rows(batch, batch_size, [0]),
        1,
    )
    return AttributionPlan(**{**vars(gradients), "outer": ()}, objective=objective, mode="train", seeded=True)


class Featurizer:
    r"""Computes the rows of one snapshot, :math:`\phi = P \nabla f` and the values beside it.

    Args:
        module: a module that can be attributed, in eval mode, at the snapshot's weights.
        plan: from :func:`plan`, made once for all snapshots.
        projection: the snapshot's.
        memory: what a batch may take before it goes through in parts; without it, nothing is split.
        snapshot: key of the random numbers that a module draws for its samples.
        first_row: added to their row numbers in these draws, so that targets do not get those of training samples.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_attr import AttributionMixin
        >>> from lightning_attr.parameters.layout import ParameterLayout
        >>> from lightning_attr.projectors import IdentityProjector
        >>> class Classifier(AttributionMixin, nn.Linear): ...
        >>> module, batch = Classifier(2, 3).eval(), (torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> projection = IdentityProjector().bind(ParameterLayout.of(module), "final")
        >>> rows = Featurizer(module, plan(module, batch, 4), projection)(batch, [0, 1, 2, 3])
        >>> {name: tuple(values.shape) for name, values in rows.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'features': (4, 9), 'output': (4,), 'loss': (4,), 'out_to_loss': (4,), 'newton_weight': (4,), 'label': (4,)}
    """

    def __init__(
        self,
        module: Any,
        plan: AttributionPlan,
        projection: Projection,
        memory: MemoryBudget | None = None,
        snapshot: str = "",
        first_row: int = 0,
    ) -> None:
        assert plan.objective.module is module, "a plan is of one module"
        self.module = module
        self.plan = plan
        self.projection = projection
        self.memory = memory
        self.snapshot = snapshot
        self.first_row = first_row
        self.rows_a_sample = 1
        wanted = projection.names
        hooked, fallback = (
            [name for name in names if wanted is None or name in wanted] for names in (plan.hooked, plan.fallback)
        )
        self.gradients = HookedGradients(module, hooked, plan.direct)
        trainable = [p for p in module.parameters() if p.requires_grad]
        self.dtype = torch.promote_types(real_dtype(trainable[0].dtype), torch.float32)
        self.numel = sum(p.numel() for p in trainable)
        self.fallback = {name: p for name, p in module.named_parameters() if name in fallback}

    def __call__(self, batch: Any, rows: Sequence[int], out: Tensor | None = None) -> dict[str, Tensor]:
        """Featurize a batch.

        Shapes: out (b, dim). Returns column name -> values: ``features`` ``(b, dim)``, and ``output``, ``loss``,
        ``out_to_loss``, ``newton_weight``, each ``(b,)``, float32 (float64 for a float64 module); ``label`` ``(b,)``
        int64 if the targets are class labels.
        """
        return self._whole(batch, rows, out, late=False)

    def late(self, batch: Any, rows: Sequence[int]) -> dict[str, Tensor]:
        """Featurize a batch without a wait: where a check fails, its output is NaN, for the caller to look at later."""
        return self._whole(batch, rows, None, late=True)

    def _whole(self, batch: Any, rows: Sequence[int], out: Tensor | None, late: bool) -> dict[str, Tensor]:
        # Without gradients, a batch takes less than in training.
        apart = self.plan.seeded or isinstance(batch, SamplesApart)
        featurize = self._one_by_one if apart else self._featurize
        with named_failures(self.module, rows, partial(self._run_alone, batch, rows)):
            if self.memory is None or (self.projection.dim == 0 and not self.memory.demanded):
                return plain_tensors(featurize(batch, rows, out, late))
            kind = f"{type(self.projection).__name__} {self.projection.dim} x {self.rows_a_sample}"
            numbers = self.projection.dim * self.rows_a_sample + self.numel
            return plain_tensors(self.memory.run(partial(featurize, out=out, late=late), batch, rows, kind, numbers))

    def _one_by_one(self, batch: Any, rows: Sequence[int], out: Tensor | None, late: bool) -> dict[str, Tensor]:
        """Featurize samples apart, where they come so, or so that the random numbers of each are its own."""
        if out is None or len(out) != len(rows) or out.device != _device(self.module):
            out = torch.empty(len(rows), self.projection.dim, dtype=self.dtype, device=_device(self.module))
        parts = [
            self._featurize(select_rows(batch, len(rows), [i]), [row], out[i : i + 1], late)
            for i, row in enumerate(rows)
        ]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "features"}
        in_place = all(part["features"].data_ptr() == out[i].data_ptr() for i, part in enumerate(parts))
        return {"features": out if in_place else torch.cat([part["features"] for part in parts]), **columns}

    def _featurize(self, batch: Any, rows: Sequence[int], out: Tensor | None, late: bool) -> dict[str, Tensor]:
        device, draws = _device(self.module), draws_of(self.module)
        if out is None or len(out) != len(rows) or out.device != device:  # a part of the batch, for instance
            out = torch.empty(len(rows), self.projection.dim, dtype=self.dtype, device=device)
        features = out
        values: dict[str, Tensor] = {}
        drawn = [row + self.first_row for row in rows]
        with self.projection.filling(features) as add, named_samples(rows), late_checks(late) as wrong:
            for number in range(draws):
                given = self.given(batch, drawn, number)
                key = ("mode", self.snapshot, number, *drawn)
                seed = hashed_seed(*key) if self.plan.seeded else None
                for name, column in self._draw(given, len(rows), add, seed).items():
                    # Projections are linear: the mean of features is the feature of the mean.
                    share = column if name == "label" or draws == 1 else column / draws
                    values[name] = values[name] + share if name in values and name != "label" else share
        if draws > 1:
            features /= draws
        columns = self.projection.finish({"features": features, **values})
        if not late:
            check_finite(self.module, columns, rows)
        elif wrong:
            marked = "output" if "output" in columns else "features"
            columns = {**columns, marked: columns[marked].masked_fill(torch.stack(wrong).any(), float("nan"))}
        return {name: values if name == "label" else values.to(self.dtype) for name, values in columns.items()}

    def _run_alone(self, batch: Any, rows: Sequence[int], position: int) -> None:
        """Run a sample of a batch, to see whether it goes through."""
        one = self.given(select_rows(batch, len(rows), [position]), [rows[position] + self.first_row], 0)
        with torch.enable_grad(), plain_execution():  # some steps differentiate
            self.plan.objective.sample_outputs(one, 1)

    def given(self, batch: Any, rows: Sequence[int], number: int) -> Any:
        """Complete a batch with what is drawn for its samples.

        Returns what is attributed takes this batch.
        """
        return completed(self.module, batch, Draw(rows, self.snapshot, number, _device(self.module)))

    def _draw(self, batch: Any, batch_size: int, add: LayerSink, seed: int | None) -> dict[str, Tensor]:
        """Add the features of one draw, and return the values beside them."""
        objective = self.plan.objective
        seen: list[Any] = []

        def forward() -> Tensor:
            with seeded(seed):
                output, behind = objective.forward(batch, batch_size)
            seen.append(behind)
            return output

        if self.projection.dim == 0:  # only the values beside the features are wanted
            with torch.set_grad_enabled(self.plan.inner):
                output = forward().detach()
        elif isinstance(objective, OutputApart):  # of one sample: its gradient is that of the batch
            output, gradients = whole_gradients(forward, self.fallback)
            add({name: as_pairs(gradient).to(self.dtype) for name, gradient in gradients.items()})
        else:
            output = self.gradients(forward, batch_size, add)
            with seeded(seed):
                fallback = self._fallback_gradients(batch, batch_size)
            add({name: as_pairs(gradient).to(self.dtype) for name, gradient in fallback.items()})
        return objective.columns(batch, output, seen[0])

    def _fallback_gradients(self, batch: Any, batch_size: int) -> dict[str, Tensor]:
        if not self.fallback:
            return {}

        def functional_output(params: Mapping[str, Tensor], batch: Any) -> Tensor:
            return self.plan.objective.functional_output(params, batch)

        per_sample = vmap_gradients if self.plan.vectorised else loop_gradients
        # The plan was checked outside autocast, and vmap cannot run all layers inside it (BatchNorm mixes dtypes).
        with torch.autocast(next(iter(self.fallback.values())).device.type, enabled=False):
            return per_sample(functional_output, self.fallback, batch, batch_size)


def _device(module: Any) -> torch.device:
    device: torch.device = next(module.parameters()).device
    return device
