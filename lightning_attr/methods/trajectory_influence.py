"""TrajectoryInfluence: influence along the steps of a run, with its weights put back at each snapshot."""

from __future__ import annotations

from lightning_attr.arguments.checks import check_choice
from lightning_attr.methods.support.run_method import RunMethod
from lightning_attr.replay.drift import largest_drift
from lightning_attr.replay.recorded_run import RecordedRun
from lightning_attr.replay.state import RunState
from lightning_attr.replay.trajectory import Visit


class TrajectoryInfluence(RunMethod):
    r"""Influence along the trajectory of the run (data value embedding, Wang et al., 2025; AdamW-influence).

    As :class:`MAGIC`, each optimizer step is gone back through, on the side of the target and for every parameter:

    .. math:: \lambda_t = \Big( \frac{\partial s_{t+1}}{\partial s_t} \Big)^\top \lambda_{t+1}, \qquad
        \tau_{ij} = \sum_{t : i \in B_t} \lambda_{t+1}^\top \frac{\partial s_{t+1}}{\partial w_i}

    with the state :math:`s = (\theta, m, v)` of parameters and moments. But the trajectory need not come out exactly:
    at each snapshot the weights are put back to those on record, so that runs are welcome whose random numbers are not
    known, such as those of augmentation in worker processes. How far the replay was off is in the provenance, as
    ``drift``.

    Args:
        hessian: "exact" for that of the batch's loss; "gram" for the sum of outer products of the samples' gradients
            in its place, which has no negative eigenvalues, as data value embedding has it; "none" to leave it out.
        self_influence: whether each training sample is scored for its own output, which makes it a target more;
            without, ``self_influence`` is NaN.

    Raises:
        ValueError: if ``hessian`` is none of these.

    Example:
        >>> TrajectoryInfluence("gram").hessian
        'gram'
    """

    def __init__(self, hessian: str = "exact", self_influence: bool = False) -> None:
        super().__init__(self_influence)
        check_choice(self, "hessian", hessian, ("exact", "gram", "none"))
        self.hessian = hessian

    def _visit(self, run: RecordedRun, found: dict[str, float]) -> Visit:
        def put_back(number: int, state: RunState) -> RunState:
            if number not in run.snapshots:
                return state
            recorded = run.state_at(number)
            found[run.snapshots[number]] = largest_drift(state, recorded)[1]
            return state._replace(parameters=recorded.parameters, buffers=recorded.buffers)

        return put_back
