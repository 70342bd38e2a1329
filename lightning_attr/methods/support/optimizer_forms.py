r"""How an optimizer turns gradients into steps: what a unit of gradient, kept up over a time, moves each parameter by.

.. math:: \dot\theta = -D \nabla L, \qquad D_j = \frac{\eta_j}{\eta} \, s_j

with :math:`s_j = 1 / (1 - \beta_j)` for SGD, and :math:`s_j = 1 / (\sqrt{\hat v_j} + \epsilon)` for Adam,
with heavy-ball momentum :math:`\beta`; time is the sum of learning rates, their mean :math:`\eta` over all entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_float
from lightning_attr.errors import AttributionError
from lightning_attr.methods.base import SnapshotFeatures
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.optimizer_state import OptimizerState

Form: TypeAlias = Literal["sgd", "adam"]
FORMS = ("auto", *get_args(Form))
_KNOWN: Mapping[str, Form] = {"SGD": "sgd", "Adam": "adam", "AdamW": "adam"}


@dataclass(frozen=True)
class OptimizerForm:
    """Settings of a run's optimizers, by parameter.

    Args:
        form: "sgd" or "adam".
        momentum: of each parameter, or of all; of "sgd" only.
        weight_decay: of each parameter that has any.
        decoupled: whether weight decay is no part of the gradient that Adam scales.

    Example:
        >>> OptimizerForm("sgd", 0.5).factor("weight")
        2.0
    """

    form: Form
    momentum: float | Mapping[str, float] = 0.0
    weight_decay: Mapping[str, float] | None = None
    decoupled: bool = False

    def factor(self, name: str) -> float:
        """Give what momentum multiplies the learning rate of a parameter with."""
        momentum = self.momentum.get(name, 0.0) if isinstance(self.momentum, Mapping) else self.momentum
        return 1 / (1 - momentum)

    def decay(self, layout: ParameterLayout) -> float:
        """Give the mean weight decay over all entries."""
        return layout.mean(self.weight_decay or {})[0]


def check_momentum(owner: object, momentum: float | None, optimizer: str) -> float | None:
    """Check a momentum, which Adam has none of.

    Returns Python's float, or None.
    """
    if momentum is None:
        return None
    if optimizer == "adam":
        raise ValueError(
            f'Expected argument `momentum` of {type(owner).__name__} only with `optimizer="sgd"` or "auto": what Adam '
            f"keeps of earlier gradients does not add to its step, but got {momentum!r}."
        )
    return check_float(owner, "momentum", momentum, minimum=0, below=1, also="None for that on record")


def recorded_form(
    snapshot: SnapshotFeatures, method: str, optimizer: str = "auto", momentum: float | None = None
) -> OptimizerForm:
    """Choose the form by what the store recorded of the run's optimizers, or as it is asked for.

    Returns the form.
    """
    groups = list(_groups(snapshot.optimizers))
    kinds = sorted({kind for kind, _ in groups})
    if optimizer == "auto":
        if not groups:
            raise AttributionError(
                f'Expected a store that recorded the optimizer of its run for {method}(optimizer="auto"), but this '
                f"one has no record of it: an earlier version or checkpoint files wrote it. Say how it was trained: "
                f'{method}(optimizer="sgd", momentum=0.9), for instance, or {method}(optimizer="adam").'
            )
        unknown = [kind for kind in kinds if kind not in _KNOWN]
        if unknown or len({_KNOWN[kind] for kind in kinds}) > 1:
            raise AttributionError(
                f"Expected a run of one kind of optimizer that {method} has a form for ({', '.join(_KNOWN)}), but this "
                f'one was trained by {", ".join(kinds)}. Take the form that is nearest: {method}(optimizer="sgd") or '
                f'{method}(optimizer="adam"), which needs the moments of Adam.'
            )
    form = _KNOWN[kinds[0]] if optimizer == "auto" else ("adam" if optimizer == "adam" else "sgd")
    found = {name: _number(group, "momentum") for _, group in groups for name in group.get("parameters", ())}
    decays = {name: _number(group, "weight_decay") for _, group in groups for name in group.get("parameters", ())}
    if form == "sgd" and momentum is None and not groups:
        raise AttributionError(
            f"Expected argument `momentum` of {method}, because this store has no record of its run's optimizer. Pass "
            f'that of the optimizer: {method}(optimizer="sgd", momentum=0.9), or 0.0 for none.'
        )
    return OptimizerForm(
        form,
        0.0 if form == "adam" else (found if momentum is None else momentum),
        decays,
        "AdamW" in kinds or any(group.get("decoupled_weight_decay") is True for _, group in groups),
    )


def _groups(optimizers: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Kind and settings of each group; a record from elsewhere may hold anything."""
    for optimizer in optimizers if isinstance(optimizers, Sequence) else ():
        for group in optimizer.get("groups", ()) if isinstance(optimizer, Mapping) else ():
            if isinstance(group, Mapping) and isinstance(group.get("parameters"), Sequence):
                yield str(optimizer.get("kind")), group


def _number(group: Mapping[str, Any], name: str) -> float:
    value = group.get(name, 0.0)
    value = float(value) if isinstance(value, (int, float)) else 0.0
    return value if 0 <= value < 1 else 0.0


def metric(
    snapshots: Sequence[SnapshotFeatures], layout: ParameterLayout, form: OptimizerForm
) -> tuple[float, Tensor | None]:
    """Compute the time that some snapshots stand for, and the mean of ``D`` over it.

    Returns the time, and ``D``, ``(p,)``, float64; None for ones.
    """
    times = dict.fromkeys(layout.shapes, 0.0)
    for snapshot in snapshots:
        for name in times:
            rate = snapshot.learning_rate if snapshot.rates is None else snapshot.rates.get(name, 0.0)
            times[name] += rate * form.factor(name)
    time, differ = layout.mean(times)
    if form.form == "sgd" and differ is None:
        return time, None
    scales = {name: own / time if time else 0.0 for name, own in times.items()}
    states = [_state(snapshot) for snapshot in snapshots] if form.form == "adam" else []
    parts = []
    for name, shape in layout.shapes.items():
        own = torch.full(shape, scales[name], dtype=torch.float64)
        if form.form == "adam":
            found = [state.moments[name] for state in states if name in state.moments]
            # A parameter that has never been updated has no moments, and does not move.
            mean = sum((moments.preconditioner().double() for moments in found), torch.zeros(shape).double())
            own = own * mean / max(1, len(found))
        parts.append(own.flatten())
    return time, torch.cat(parts)


def _state(snapshot: SnapshotFeatures) -> OptimizerState:
    if snapshot.optimizer_state is None:
        raise AttributionError(
            f"Expected the moments of Adam at snapshot {snapshot.key!r}, but features are all there is. Use "
            "`trainer.attribute(..., store=...)` with the store of a run of AttributionCallback(optimizer_state=True)."
        )
    return snapshot.optimizer_state()
