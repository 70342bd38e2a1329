"""MAGIC: exact metagradients of a recorded run."""

from __future__ import annotations

import logging

from lightning_attr.arguments.checks import check_flag, check_float
from lightning_attr.errors import AttributionError
from lightning_attr.methods.base import SnapshotFeatures
from lightning_attr.methods.support.run_method import RunMethod
from lightning_attr.replay.drift import largest_drift
from lightning_attr.replay.recorded_run import RecordedRun
from lightning_attr.replay.smoothness import metasmoothness
from lightning_attr.replay.state import RunState
from lightning_attr.replay.trajectory import Visit

log = logging.getLogger(__name__)

_SMOOTH = 0.8
"""Below, first-order predictions are said to fail (Engstrom et al., 2025)."""


class MAGIC(RunMethod):
    r"""Exact metagradients (Engstrom et al., 2025; Ilyas and Engstrom, 2025), by a replay of the run.

    The derivative of a target's output by the weight that a training sample has in every loss of the run:

    .. math:: \tau_{ij} = \left. \frac{d f_j(\theta_T(w))}{d w_i} \right|_{w = 1}

    The run is replayed from its journal, with the user's own ``training_step``, and differentiated backwards through
    every optimizer step: SGD with momentum, Adam, AdamW, clipping, weight decay, accumulation, schedules. Batches,
    dropout and augmentation are those of the run. Samples of a batch share its statistics where there is BatchNorm: the
    derivative sees that, and the running statistics. Positive scores are proponents, in units of the model output: how
    much it would fall, to first order, if the sample had the weight zero wherever it was drawn, while the order, the
    number of steps and the denominators stay.

    Every snapshot on the way is compared with the replay. Each step is taken twice and gone back through once, for all
    targets together: of an MLP on digits, seven trainings for one target and eighteen for twenty. In memory are
    :math:`2 \sqrt T` states of :math:`T` steps, and two of each target.

    Args:
        tolerance: largest relative difference of a parameter from its snapshot, :math:`|x - x_0| / |x_0|`; on the
            machine that trained it is usually 0.0, which the result's provenance has as ``drift``.
        probe: measure beforehand whether the run is smooth enough
            (:func:`lightning_attr.replay.smoothness.metasmoothness`, in the provenance as ``smoothness``), by three
            trainings more; a warning says so if not.
        self_influence: whether each training sample is scored for its own output, which makes it a target more;
            without, ``self_influence`` is NaN.

    Raises:
        ValueError: if ``tolerance`` is negative.

    Example:
        >>> MAGIC().tolerance
        0.0001
    """

    def __init__(self, tolerance: float = 1e-4, probe: bool = False, self_influence: bool = False) -> None:
        super().__init__(self_influence)
        self.tolerance = check_float(self, "tolerance", tolerance, minimum=0)
        self.probe = check_flag(self, "probe", probe)

    def _visit(self, run: RecordedRun, found: dict[str, float]) -> Visit:
        def compared(number: int, state: RunState) -> RunState:
            if number in run.snapshots:
                name, drift = largest_drift(state, run.state_at(number))
                found[run.snapshots[number]] = drift
                if drift > self.tolerance:
                    raise _drifted(run, number, name, drift, self.tolerance)
            return state

        return compared

    def _look(self, snapshot: SnapshotFeatures, run: RecordedRun) -> None:
        if not self.probe:
            return
        found = metasmoothness(run.state_at(0), run.replay_steps, run.n_rows)
        snapshot.evidence["smoothness"] = found
        if found < _SMOOTH:
            log.warning(
                "The run is not smooth: its metasmoothness is %.2f, where 1 is best. MAGIC is exact for small changes "
                "of the samples' weights, which then say little of removals. Smaller learning rates, larger batches "
                "and smooth activations help.",
                found,
            )


def _drifted(run: RecordedRun, number: int, name: str, drift: float, tolerance: float) -> AttributionError:
    unknown = any(batch.random_state is None for step in run.steps[:number] for batch in step.batches)
    unread = any(batch.reading_state is None for step in run.steps[:number] for batch in step.batches)
    causes = [
        *(["random states of the training steps that the journal has not kept (dropout, noise)"] if unknown else []),
        *(["augmentation in worker processes, whose random numbers nobody knows"] if unread else []),
        "hooks that change gradients or weights (`on_before_optimizer_step`, `on_after_backward`, callbacks)",
        "settings that change with the steps beside learning rate and weight decay (momentum of OneCycleLR)",
        "state outside parameters and buffers, another machine, or other versions",
    ]
    return AttributionError(
        f"The replay is not the run: after {number} optimizer steps `{name}` differs from the snapshot "
        f"{run.snapshots[number]!r} by {drift:.2g} of its length, and MAGIC allows tolerance={tolerance:g}. What may "
        f"be behind it: {'; '.join(causes)}. TrajectoryInfluence() needs no exact replay: it puts the weights back at "
        "each snapshot."
    )
