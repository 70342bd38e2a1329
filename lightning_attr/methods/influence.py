"""Influence functions: any curvature of the training objective, any solver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_choice, check_float, check_seed
from lightning_attr.arguments.messages import argument_message
from lightning_attr.curvature.groups import group_influence
from lightning_attr.methods.base import ScoreBlock, SnapshotFeatures
from lightning_attr.methods.cache import CacheKey
from lightning_attr.methods.solvers.astra import Astra
from lightning_attr.methods.solvers.base import Arnoldi, Explicit, Inverse, Prepared, Solver
from lightning_attr.methods.solvers.batch_curvature import Curvature
from lightning_attr.methods.solvers.iterative import ConjugateGradient, LiSSA
from lightning_attr.methods.solvers.layerwise import EKFAC, KFAC, DataInf
from lightning_attr.methods.solvers.training_curvature import TrainingCurvature
from lightning_attr.methods.support.damping import DampedMethod, check_damping
from lightning_attr.methods.support.module_method import ModelMethod, model_of
from lightning_attr.methods.support.relatif import Relative, divisor
from lightning_attr.methods.support.subset_truth import SubsetTruth
from lightning_attr.projectors import IdentityProjector, MatrixProjection, Projection

T = TypeVar("T")

_CURVATURE: CacheKey[TrainingCurvature] = CacheKey("curvature")
_PREPARED: CacheKey[Prepared] = CacheKey("prepared solver")
_INVERSE: CacheKey[Inverse] = CacheKey("inverse")
_FORMS: CacheKey[Tensor] = CacheKey("quadratic forms")

_SOLVERS: Mapping[str, Callable[[], Solver]] = {
    "ekfac": EKFAC,
    "kfac": KFAC,
    "explicit": Explicit,
    "cg": ConjugateGradient,
    "lissa": LiSSA,
    "arnoldi": Arnoldi,
    "datainf": DataInf,
    "astra": Astra,
}


class Influence(DampedMethod, ModelMethod):
    r"""Influence functions (Koh and Liang, 2017): what a small change of a sample's weight does to the trained model.

    .. math::
        \tau_{ij} = -\frac1n \nabla f_j^\top (C + \lambda I)^{-1} \nabla \ell_i
        = \frac1n q_i \nabla f_j^\top (C + \lambda I)^{-1} \nabla f_i

    with the curvature ``C`` of the mean training loss over all training samples, of all processes, and
    :math:`q = -d\ell/df`. Targets are solved for, then one pass over the training samples scores them. Positive scores
    are proponents, in units of the model output.

    What a solver costs, with ``n`` training samples and ``m`` targets: "ekfac", "kfac" two passes over the training
    set; "explicit" ``p`` products with the curvature, once; "cg", "lissa" a hundred to thousands of products per
    target, and as many for the self-influence of each training sample, unless ``self_influence="ekfac"``; "astra" the
    passes of "ekfac", and 20 products with 256 samples for each target and training sample, likewise; "arnoldi" 200
    products, once; "datainf" a pass over the training set a tile of targets, and one a tile of training samples. A
    product is about three training steps on all samples.

    Args:
        curvature: "ggn", the generalised Gauss-Newton matrix, which for the usual losses is the true Fisher matrix;
            "hessian", which is right at a strict minimum only; "empirical_fisher". By default "ggn", or the only one
            that a solver has.
        solver: a name, or settings: :class:`EKFAC`, :class:`KFAC`, :class:`Explicit`, :class:`ConjugateGradient`,
            :class:`LiSSA`, :class:`Arnoldi`, :class:`DataInf`, :class:`Astra`.
        damping: :math:`\lambda` as a multiple of the mean eigenvalue of ``C`` (of a layer, for "ekfac", "kfac" and
            "datainf"); by default 0.1 a layer, and 10 for the whole. "auto" chooses by the ``truth``.
        weight_decay: :math:`\rho` of an L2 term :math:`\frac\rho2 |\theta|^2` of the training objective, such as the
            optimizer's weight decay; it adds :math:`\rho` to the curvature.
        relative: "theta" or "loss" for RelatIF, see :mod:`lightning_attr.methods.support.relatif`; scores are then for
            ranking only.
        snapshots: "last" for the last snapshot, "all" for all of them, each with an equal part.
        seed: of labels, batches and start vectors.
        self_influence: "exact" for that of the scores' own solver; "ekfac" for an approximation by the factors of
            EK-FAC in two passes, where "cg", "lissa" or "astra" would solve for each training sample.
            RelatIF divides by it.
        truth: models retrained on subsets, for ``damping="auto"``.

    Raises:
        ValueError: if an argument is none of these, or does not go with another.

    Example:
        >>> from torch import nn
        >>> from lightning_attr import AttributionMixin
        >>> from lightning_attr.outputs import Regression
        >>> from lightning_attr.features.snapshot_model import SnapshotModel
        >>> class Line(AttributionMixin, nn.Linear):
        ...     model_output = Regression()
        >>> line = Line(1, 1, bias=False).eval()
        >>> _ = nn.init.zeros_(line.weight)
        >>> train, targets = (torch.tensor([[1.0], [2.0]]), torch.ones(2)), (torch.tensor([[5.0]]), torch.zeros(1))
        >>> snapshot = SnapshotFeatures.at(SnapshotModel.of(line, [train], [targets]), {})
        >>> (block,) = Influence(solver="explicit", damping=0.0).score([snapshot])
        >>> block.scores.flatten(), block.self_influence           # x_i x_j (y_i - f_i) / (1 + 4)
        (tensor([1., 2.]), tensor([0.2000, 0.8000]))
    """

    def __init__(
        self,
        curvature: str | None = None,
        solver: str | Solver = "ekfac",
        damping: float | str | None = None,
        weight_decay: float = 0.0,
        relative: str | None = None,
        snapshots: str = "last",
        seed: int = 0,
        self_influence: str = "exact",
        truth: SubsetTruth | None = None,
    ) -> None:
        super().__init__(snapshots)
        if not isinstance(solver, Solver):
            check_choice(self, "solver", solver, _SOLVERS, "a Solver such as `EKFAC()`")
            solver = _SOLVERS[solver]()
        self.solver = solver
        self.curvature = solver.curvatures[0] if curvature is None else curvature
        check_choice(self, "curvature", self.curvature, get_args(Curvature))
        if self.curvature not in solver.curvatures:
            expected = f"{' or '.join(map(repr, solver.curvatures))} for the solver {solver.name!r}"
            raise ValueError(argument_message(self, "curvature", expected, curvature))
        check_choice(self, "relative", relative, (*get_args(Relative), None))
        check_choice(self, "self_influence", self_influence, ("exact", "ekfac"))
        self.usual_damping = solver.usual_damping
        self.damping = check_damping(self, self.usual_damping if damping is None else damping, truth)
        self.truth = truth
        self.weight_decay = check_float(self, "weight_decay", weight_decay, minimum=0)
        self.relative = relative
        self.seed = check_seed(self, seed)
        self.self_influence = self_influence

    @property
    def config(self) -> dict[str, Any]:
        """Name and arguments, for the record of a result."""
        scale = "measurement" if self.relative is None else "rank_only"
        plain = {name: value for name, value in super().config.items() if name not in {"solver", "usual_damping"}}
        return {**plain, **self.solver.config, "scale": scale}

    def score_snapshot(self, snapshot: SnapshotFeatures) -> Iterator[ScoreBlock]:
        """Score this process's training samples at one snapshot; see :meth:`ModelMethod.score_snapshot`.

        The evidence gets what the solver has found out, such as the share of the parameters that it covers, iterations
        and residuals.

        Args:
            snapshot: with its model.

        Yields:
            Blocks of scores.

        Raises:
            DivergenceError: if LiSSA diverges.
            NegativeCurvatureError: if conjugate gradients meet negative curvature, or Arnoldi nothing positive.
            TypeError: if the GGN is wanted of a module that does not show its outputs.
            UnsupportedLayerError: if there is no layer with Kronecker factors for "ekfac" or "kfac".
            ValueError: if the damped curvature is singular.
        """
        model = model_of(snapshot)
        inverse, count = self._inverse(snapshot), len(snapshot.target_rows)
        if snapshot.wanted is not None and self.relative is None and self.snapshots == "last":
            yield from self._candidates(snapshot)  # several snapshots are weighed by self-influence
            return
        joint = None
        if self.self_influence == "exact" and count:
            joint = inverse.joint(self._target_gradients(snapshot), (1, 2) if self.relative == "theta" else (1,))
        if joint is None:
            projection: Projection = MatrixProjection(model.layout, self._solved_targets(snapshot))
            forms = self._forms(snapshot)
        else:
            projection = joint
        self._curvature(snapshot).release()
        snapshot.evidence.update(inverse.found)
        for rows, columns in model.train(projection):
            products = columns["features"][:, :count]
            own = forms[:, rows.start : rows.stop] if joint is None else columns["features"][:, count:].T
            first, second = own[0], own[-1]
            n = snapshot.n_drawn or model.n_train
            out_to_loss = columns["out_to_loss"] / n
            scale = divisor(self.relative, out_to_loss**2 * n * first, out_to_loss**2 * second)
            yield ScoreBlock(rows, (out_to_loss / scale)[:, None] * products, out_to_loss / scale * first)

    def score_groups(self, snapshot: SnapshotFeatures, groups: Sequence[Sequence[int]], order: int = 1) -> Tensor:
        r"""Score groups of training samples that are left out together, at one snapshot (Koh et al., 2019).

        The first order is the sum of the samples' scores. The second also sees the curvature that the group takes away
        with it (Basu et al., 2020): groups of many or of alike samples matter more than their sum. With exact solvers
        the series over all orders is exact for a quadratic objective.

        Args:
            snapshot: with its model.
            groups: rows of the training samples of each group, each row at most once.
            order: terms of the series; each above the first takes a solve and a product with each group.

        Returns:
            ``(len(groups), m)``, in units of the model output; positive: the group raises the target's output.

        Raises:
            IndexError: if a row is not of the training set.
            ValueError: if ``order`` is not positive, or with ``relative``, which is of single samples.

        Example:
            >>> from torch import nn
            >>> from lightning_attr import AttributionMixin
            >>> from lightning_attr.outputs import Regression
            >>> from lightning_attr.features.snapshot_model import SnapshotModel
            >>> class Line(AttributionMixin, nn.Linear):
            ...     model_output = Regression()
            >>> line = Line(1, 1, bias=False).eval()
            >>> _ = nn.init.constant_(line.weight, 0.5)               # the least squares of 1 -> 0, 1 -> 1
            >>> train, targets = (torch.ones(2, 1), torch.tensor([0.0, 1.0])), (torch.ones(1, 1), torch.zeros(1))
            >>> snapshot = SnapshotFeatures.at(SnapshotModel.of(line, [train], [targets]), {})
            >>> method = Influence(solver="explicit", damping=0.0)
            >>> [method.score_groups(snapshot, [[1]], order).item() for order in (1, 2, 8)]  # without it: 0.5 lower
            [0.25, 0.375, 0.498046875]
        """
        if self.relative is not None:
            raise ValueError("Expected `relative=None` for groups: RelatIF is of single samples.")
        model = model_of(snapshot)
        for group in groups:
            if not all(0 <= row < model.n_train for row in group) or len(set(group)) < len(group):
                raise IndexError(
                    f"Expected argument `groups` to hold different rows from 0 to {model.n_train - 1}, but got {group}."
                )
        inverse = self._inverse(snapshot)
        curvature = self._curvature(snapshot)
        members = torch.zeros(len(groups), model.n_train, dtype=model.dtype, device=model.device)
        for number, group in enumerate(groups):
            members[number, list(group)] = 1
        sums = torch.zeros(len(groups), curvature.size, dtype=model.dtype, device=model.device)
        for rows, gradients, q in curvature.gradients():
            sums.addmm_(members[:, rows.start : rows.stop] * -q, gradients)
        identity = IdentityProjector().bind(model.layout, model.key)
        return group_influence(
            lambda rows: inverse.solve(rows) / model.n_train,
            model.reduce(sums),
            model.targets(identity, snapshot.target_rows)["features"],
            order=order,
            group_product=lambda rows: torch.cat([
                curvature.group_product(row[None], group) for row, group in zip(rows, groups, strict=True)
            ]),
        )

    def _candidates(self, snapshot: SnapshotFeatures) -> Iterator[ScoreBlock]:
        """Score batches with rows wanted, without self-influence, which some solvers solve each sample for."""
        model = model_of(snapshot)
        projection = MatrixProjection(model.layout, self._solved_targets(snapshot))
        self._curvature(snapshot).release()
        snapshot.evidence.update(self._inverse(snapshot).found)
        for rows, columns in model.train(projection, snapshot.wanted):
            push = columns["out_to_loss"] / (snapshot.n_drawn or model.n_train)
            yield ScoreBlock(rows, push[:, None] * columns["features"], torch.zeros_like(push))

    def _solved_targets(self, snapshot: SnapshotFeatures) -> Tensor:
        """Solve for the gradients of the targets, ``(m, p)``."""
        gradients = self._target_gradients(snapshot)
        return self._inverse(snapshot).solve(gradients) if len(gradients) else gradients

    def _target_gradients(self, snapshot: SnapshotFeatures) -> Tensor:
        """Gradients of the targets, ``(m, p)``."""
        model = model_of(snapshot)
        identity = IdentityProjector().bind(model.layout, model.key)
        return model.targets(identity, snapshot.target_rows)["features"]

    def _inverse(self, snapshot: SnapshotFeatures) -> Inverse:
        """Prepare the inverse, once for all targets and, but for the last step, for all dampings."""
        return self._prepared(snapshot, self.solver, "inverse")

    def _forms(self, snapshot: SnapshotFeatures) -> Tensor:
        def forms() -> Tensor:
            inverse = self._inverse(snapshot)
            if self.self_influence == "ekfac":
                inverse = self._prepared(snapshot, EKFAC(), "approximate inverse")
            return torch.stack(inverse.quadratic_forms(squared=self.relative == "theta"))

        return snapshot.cache.once(_FORMS.at(self.damping_at(snapshot)), forms)

    def _prepared(self, snapshot: SnapshotFeatures, solver: Solver, name: str) -> Inverse:
        cache, damping = snapshot.cache, self.damping_at(snapshot)
        prepared = cache.once(_PREPARED.at(name), lambda: solver.prepare(self._curvature(snapshot), self.seed))
        return cache.once(_INVERSE.at(name, damping), lambda: prepared(damping))

    def _curvature(self, snapshot: SnapshotFeatures) -> TrainingCurvature:
        def curvature() -> TrainingCurvature:
            return TrainingCurvature(model_of(snapshot), self.curvature, self.weight_decay)

        return snapshot.cache.once(_CURVATURE, curvature)
