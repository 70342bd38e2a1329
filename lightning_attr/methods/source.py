"""SOURCE: what is left at the end of training of a push at any time of it, by approximate unrolling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_choice, check_float, check_seed
from lightning_attr.curvature.unrolling import UnrolledSegment
from lightning_attr.errors import AttributionError
from lightning_attr.methods.base import AttributionMethod, ScoreBlock, SnapshotFeatures
from lightning_attr.methods.cache import CacheKey
from lightning_attr.methods.solvers.layerwise import EKFAC, KFAC, fit_factors
from lightning_attr.methods.support.module_method import model_of
from lightning_attr.methods.support.optimizer_forms import FORMS, check_momentum, metric, recorded_form
from lightning_attr.methods.support.run_segments import check_segments, segments_of
from lightning_attr.methods.tracin import learning_rates
from lightning_attr.projectors import IdentityProjector, MatrixProjection

_SOLVERS = {"ekfac": EKFAC, "kfac": KFAC}
_OWN: CacheKey[dict[range, Tensor]] = CacheKey("self-influence of rows")
_TILE = 2**27
"""Numbers of the gradients whose self-influence is found at once."""


@dataclass(frozen=True)
class Segment:
    """Some snapshots of a run, the part that each has in the mean gradient, and the way back through them."""

    snapshots: Sequence[SnapshotFeatures]
    parts: Sequence[float]
    unrolled: UnrolledSegment


_SEGMENTS: CacheKey[list[Segment]] = CacheKey("segments")


class SOURCE(AttributionMethod):
    r"""SOURCE (Bae et al., 2024): training unrolled, in segments of constant curvature and gradients.

    .. math::
        \tau_{ij} = -\frac1n \sum_l r_{jl}^\top \bar g_{il}, \qquad
        r_{jl} = \frac{1 - e^{-t_l H_l}}{H_l} q_{jl}, \qquad q_{j,l-1} = e^{-t_l H_l} q_{jl}

    from the last segment to the first, where :math:`q` begins as the gradient of the target's output at the last
    snapshot. A segment's :math:`\bar g` is the mean gradient of the sample's loss over its snapshots, each by the
    learning rates that it stands for, :math:`H` the mean curvature over them by Kronecker factors, and :math:`t` the
    sum of the learning rates. Heavy-ball momentum multiplies :math:`t` by :math:`1 / (1 - \beta)`; the form for Adam
    puts its mean scale :math:`1 / (\sqrt{\hat v} + \epsilon)` before the gradients and around the curvature, see
    :class:`lightning_attr.curvature.unrolling.UnrolledSegment`. Nothing is damped: directions that training had no time
    to settle count as in :class:`TracIn`, and those it has settled as in :class:`Influence`.

    It needs the snapshots of a recorded run, and costs about three passes over the training set at each of them. Scores
    are in units of the model output; those of several merged runs are averaged. Self-influence follows each training
    sample as its own target: another pass at each snapshot.

    Args:
        segments: how many, of about equal learning rates; or where they end, as ascending shares of the run's summed
            learning rate, such as ``[0.2, 0.5]`` for three.
        solver: "ekfac" or "kfac", or settings: :class:`EKFAC`, :class:`KFAC`.
        curvature: "ggn" or "empirical_fisher".
        optimizer: "sgd" or "adam"; "auto" for what the store recorded. Adam's moments are there with
            ``AttributionCallback(optimizer_state=True)``.
        momentum: of "sgd", in [0, 1); None for what the store recorded.
        weight_decay: an L2 term's, or that of AdamW; None for what the store recorded.
        seed: of labels.

    Raises:
        ValueError: if an argument is none of these.

    Example:
        >>> SOURCE(segments=2).config["segments"]
        2
    """

    def __init__(
        self,
        segments: int | Sequence[float] = 3,
        solver: str | EKFAC = "ekfac",
        curvature: str = "ggn",
        optimizer: str = "auto",
        momentum: float | None = None,
        weight_decay: float | None = None,
        seed: int = 0,
    ) -> None:
        self.segments = check_segments(self, segments)
        if not isinstance(solver, EKFAC):
            check_choice(self, "solver", solver, _SOLVERS, "`EKFAC()` or `KFAC()`")
            solver = _SOLVERS[solver]()
        check_choice(self, "curvature", curvature, solver.curvatures)
        check_choice(self, "optimizer", optimizer, FORMS)
        self.projector = None
        self.solver = solver
        self.curvature = curvature
        self.optimizer = optimizer
        self.momentum = check_momentum(self, momentum, optimizer)
        self.weight_decay = None if weight_decay is None else check_float(self, "weight_decay", weight_decay, minimum=0)
        self.seed = check_seed(self, seed)

    @property
    def needs_optimizer_state(self) -> bool:
        """Whether it is asked for the form of Adam; "auto" takes the moments that are there."""
        return self.optimizer == "adam"

    @property
    def config(self) -> dict[str, Any]:
        """Name and arguments, for the record of a result."""
        plain = {name: value for name, value in super().config.items() if name != "solver"}
        return {**plain, **self.solver.config}

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Add up over the segments, and average over runs; see :meth:`AttributionMethod.score`.

        Args:
            snapshots: in the order of training, with their models.

        Yields:
            Scores, block after block.

        Raises:
            AttributionError: if there are no learning rates, or the optimizer is not known, has no form, or has no
                moments.
            UnsupportedLayerError: if no layer has Kronecker factors.
        """
        runs = [list(own) for _, own in groupby(snapshots, key=lambda snapshot: snapshot.key.rpartition("/")[0])]
        total: list[ScoreBlock] = []
        for run in runs:
            for place, block in enumerate(self._score_run(run)):
                scaled = ScoreBlock(block.rows, block.scores / len(runs), block.self_influence / len(runs))
                if place == len(total):
                    total.append(scaled)
                else:
                    total[place].scores.add_(scaled.scores)
                    total[place].self_influence.add_(scaled.self_influence)
        yield from total

    def _score_run(self, run: Sequence[SnapshotFeatures]) -> Sequence[ScoreBlock]:
        last = run[-1]
        segments = last.cache.once(_SEGMENTS, lambda: self._segments(run))
        own = last.cache.once(_OWN, lambda: self._self_influence(segments, last))
        model, m = model_of(last), len(last.target_rows)
        identity = IdentityProjector().bind(model.layout, model.key)
        targets = model.targets(identity, last.target_rows)["features"]  # (m, p)
        scores: dict[range, Tensor] = {rows: values.new_zeros(len(rows), m) for rows, values in own.items()}
        for segment, responses in zip(reversed(segments), walked_back(segments, targets), strict=True):
            for snapshot, part in zip(segment.snapshots, segment.parts, strict=True):
                at = model_of(snapshot)
                n = snapshot.n_drawn or at.n_train
                for rows, columns in at.train(MatrixProjection(at.layout, responses), last.wanted) if m else ():
                    push = part / n * columns["out_to_loss"]
                    scores[rows].addcmul_(columns["features"], push[:, None])
        return [ScoreBlock(rows, scores[rows], values) for rows, values in own.items()]

    def _segments(self, run: Sequence[SnapshotFeatures]) -> list[Segment]:
        """Fit the curvature of each segment, and say what was found."""
        last, name = run[-1], type(self).__name__
        layout = model_of(last).layout
        form = recorded_form(last, name, self.optimizer, self.momentum)
        found = []
        for own in segments_of(run, learning_rates(run), self.segments):
            models = [model_of(snapshot) for snapshot in own]
            if any(model.layout != layout for model in models):
                raise AttributionError(
                    f"Expected the same trainable parameters at every snapshot for {name}, but they change between "
                    f"{own[0].key!r} and {last.key!r}. Score the snapshots since then alone, or take TracIn."
                )
            fitted = fit_factors(self.solver, models, self.curvature, self.seed)
            time, scale = metric(own, layout, form)
            decay = form.decay(layout) if self.weight_decay is None else self.weight_decay
            unrolled = UnrolledSegment(fitted.factors, time, self.solver.method, decay, form.decoupled, scale)
            rates = [snapshot.learning_rate for snapshot in own]
            found.append(Segment(own, [rate / sum(rates) for rate in rates], unrolled))
            own[-1].evidence.update({"time": time, "parameters_covered": fitted.factors.layout.share})
        last.evidence["optimizer"] = form.form
        return found

    def _self_influence(self, segments: Sequence[Segment], last: SnapshotFeatures) -> dict[range, Tensor]:
        """Follow each training sample as its own target, as many at once as fit into memory."""
        model = model_of(last)
        batches = [range(rows[0], rows[-1] + 1) for rows, _ in model.train_batches()]
        if last.wanted is not None:
            return {rows: torch.zeros(len(rows), dtype=model.dtype, device=model.device) for rows in batches}
        height = max(1, _TILE // (model.layout.numel * (len(segments) + 2)))
        identity = IdentityProjector().bind(model.layout, model.key)
        found: dict[range, Tensor] = {}
        for wanted in _tiles(batches, height):
            blocks = [(rows, columns["features"]) for rows, columns in model_of(last).train(identity, wanted)]
            own = torch.cat([features for _, features in blocks])
            total = own.new_zeros(len(own))
            for segment, responses in zip(reversed(segments), walked_back(segments, own), strict=True):
                for snapshot, part in zip(segment.snapshots, segment.parts, strict=True):
                    at, start = model_of(snapshot), 0
                    n = snapshot.n_drawn or at.n_train
                    for _, columns in at.train(identity, wanted):
                        stop = start + len(columns["features"])
                        forms = (columns["features"] * responses[start:stop]).sum(1)
                        total[start:stop] += part / n * columns["out_to_loss"] * forms
                        start = stop
            found.update(zip([rows for rows, _ in blocks], total.split([len(rows) for rows, _ in blocks]), strict=True))
        return found


def walked_back(segments: Sequence[Segment], vectors: Tensor) -> Iterator[Tensor]:
    """Walk back through the segments, from the last one.

    Shapes: vectors (m, p). Yields ``r`` of each, ``(m, p)``.
    """
    for segment in reversed(segments):
        responses, vectors = segment.unrolled.back(vectors)
        yield responses


def _tiles(batches: Sequence[range], height: int) -> Iterator[range]:
    """Join batches that follow each other, up to some rows."""
    tile = range(0)
    for rows in batches:
        if len(tile) and rows.stop - tile.start > height:
            yield tile
            tile = range(0)
        tile = range(tile.start if len(tile) else rows.start, rows.stop)
    if len(tile):
        yield tile
