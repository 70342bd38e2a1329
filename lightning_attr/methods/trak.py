"""TRAK over the snapshots of a run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_choice, check_flag, check_int
from lightning_attr.methods.base import ScoreBlock, SnapshotFeatures, in_step
from lightning_attr.methods.choice import MOST_FEATURES, FeatureChoice, choose_features
from lightning_attr.methods.dual_gauss_newton import GaussNewtonKernel
from lightning_attr.methods.kernels.feature_kernel import KernelMethod
from lightning_attr.methods.kernels.sample_kernel import DualKernel
from lightning_attr.methods.over_snapshots import balanced_total
from lightning_attr.methods.support.subset_truth import SubsetTruth
from lightning_attr.projectors import Projector
from lightning_attr.projectors.eigen import DefaultProjector


class TRAK(KernelMethod):
    r"""Tracing with the randomly-projected after kernel (Park et al., 2023), every snapshot a member of the ensemble.

    .. math::
        S = \sum_t w_t \operatorname{diag}(q_t)\, \Phi_t (\Phi_t^\top W_t \Phi_t + \lambda_t I)^{-1} \Psi_t^\top

    with the projected output gradients of training samples :math:`\Phi_t` ``(n, k)`` and targets :math:`\Psi_t` ``(m,
    k)``, :math:`q = -d\ell/df` and :math:`W = \operatorname{diag}(d^2\ell/df^2)`: one Newton step of leaving a sample
    out of the linearised model, averaged over snapshots. Their weights :math:`w_t` sum to one and are inverse to the
    mean size of the training samples' self-influence, so that each snapshot has an equal part in the scores. With
    ``newton_weights=False`` it is TRAK as published, which drops :math:`W`, averages :math:`q` apart from the kernel
    term, and weighs all snapshots alike,

    .. math::
        S = \Big[\tfrac1T \sum_t q_t\Big] \odot \Big[\tfrac1T \sum_t \Phi_t (\Phi_t^\top \Phi_t + \lambda_t I)^{-1}
        \Psi_t^\top\Big].

    The Gauss-Newton matrix of a softmax has more to it than :math:`\Phi^\top W \Phi`: the spread of the other classes,
    which vanishes no sooner than :math:`W`. With ``kernel="ggn"`` the kernel is

    .. math::
        \Phi_t^\top W_t \Phi_t + \Gamma_t^\top \Gamma_t + \lambda_t I

    with projected random second directions :math:`\Gamma` whose outer products have that in expectation (see
    :meth:`lightning_attr.outputs.ModelOutput.second_direction`), or are all of it, as for language models; then
    :math:`\Phi_t^\top W_t \Phi_t` is left out. They are stored for so many samples as the kernel needs, and cost a pass
    more of each of these.

    Stores of several runs joined by :meth:`lightning_attr.FeatureStore.merge` are one larger ensemble. The runs may be
    of adapters on one frozen base, which are cheap to train again (a LoRA ensemble, Deng et al., 2024): gradients are
    of what is trained. Leave the untrained adapter out, whose features are half empty as long as its ``B`` is zero.

    With ``exact=True`` nothing is projected and nothing stored: the module runs at each snapshot, and in place of the
    kernel of features there is that of training samples, see
    :class:`lightning_attr.methods.kernels.sample_kernel.DualKernel`. It takes some ``32 n ** 2`` bytes of memory for
    ``n`` training samples, and their gradients; what a projection adds is noise. The kernel with second directions has
    ``1 + directions`` rows per sample, and takes ``32 ((1 + directions) n) ** 2``.

    Args:
        proj_dim: projection dimension of the default projector; by default 256 to 2,048 by the sizes of model and data,
            see :func:`lightning_attr.methods.choice.choose_features`. For small data the callback then stores weights
            only, unless something reads features while training: ``trainer.attribute`` computes them.
        projector: the projection; by default :class:`lightning_attr.projectors.EigenProjector` with ``proj_dim`` and
            ``seed``.
        damping: :math:`\lambda_t` as a multiple of the kernel's mean diagonal entry; where the number of features is
            chosen, too, of its trace over 2,048, whatever that number is. Zero is allowed for a regular kernel. "auto"
            chooses by the ``truth``, see :func:`lightning_attr.methods.support.damping.choose_damping`.
        newton_weights: weigh the kernel by the curvature of the loss; ``tests/benchmarks/lds.py`` compares both.
        seed: of the default projector.
        per_layer: one kernel per layer, each damped on its own, whose features do not interact; for projectors that
            keep the layers apart. Larger projections can be afforded so.
        loo_correction: divide the scores of a sample by :math:`1 - h_{ii} w_i`, with its leverage :math:`h_{ii} =
            \phi_i^\top (\Phi^\top W \Phi + \lambda I)^{-1} \phi_i`, at each snapshot: for a linear regression they
            are exactly what leaving the sample out does.
        truth: models retrained on at least 20 subsets, for ``damping="auto"``; an evaluation refuses these subsets.
        balanced: weigh snapshots so that each has an equal part; otherwise their plain mean counts, in which early
            snapshots, with their large ``q``, have more. Without Newton weights it is the plain mean in any case.
        exact: whole gradients in place of projected ones. The damping is then a multiple of what the mean diagonal
            entry would be with ``proj_dim`` features (2,048 by default), the trace of the kernel over ``proj_dim``.
        kernel: "ggn" for the whole Gauss-Newton matrix; "margin" for one row per sample, weighed by its Newton weight;
            "auto" for the former where model output and stored features have it, and without ``loo_correction``. The
            result's provenance says which it was.
        directions: random second directions a sample, of new features; a pass each.
        sampling: where training samples are many times the features, add the kernel up over some of them, drawn by
            their part in it, and sketch leverages, with them self-influence: the relative errors are in the evidence of
            the result, see :mod:`lightning_attr.methods.sampling`. Not with ``loo_correction``, nor where a ``truth``
            chooses the damping.

    Raises:
        ValueError: if the damping is negative, or does not go with the truth, or ``exact`` or ``kernel`` does not go
            with another argument.

    Example:
        >>> import torch
        >>> train = {"features": torch.eye(2), "out_to_loss": torch.ones(2), "newton_weight": torch.ones(2)}
        >>> targets = {"features": torch.tensor([[1.0, 0.0]])}
        >>> (block,) = TRAK(damping=1.0).score([SnapshotFeatures.of(train, targets)])
        >>> block.scores.flatten(), block.self_influence
        (tensor([0.5000, 0.0000]), tensor([0.5000, 0.5000]))
    """

    def __init__(
        self,
        proj_dim: int | None = None,
        projector: Projector | None = None,
        damping: float | str = 1.0,
        newton_weights: bool = True,
        seed: int = 0,
        per_layer: bool = False,
        loo_correction: bool = False,
        truth: SubsetTruth | None = None,
        balanced: bool = True,
        exact: bool = False,
        sampling: bool = True,
        kernel: str = "auto",
        directions: int = 1,
    ) -> None:
        if check_flag(self, "exact", exact) and (projector is not None or per_layer):
            raise ValueError(
                "Expected argument `exact` to come without `projector`, which it would ignore, and without `per_layer`."
            )
        chosen = MOST_FEATURES if proj_dim is None else proj_dim
        learned = DefaultProjector(chosen, seed)
        super().__init__(learned if projector is None else projector, damping, per_layer, truth)
        self.exact = exact
        if exact:
            self.projector, self.proj_dim = None, chosen
        self._open = proj_dim is None and projector is None and not exact
        self.choice: FeatureChoice | None = None
        self.newton_weights = check_flag(self, "newton_weights", newton_weights)
        self.balanced = check_flag(self, "balanced", balanced)
        self.loo_correction = check_flag(self, "loo_correction", loo_correction)
        self.sampling = check_flag(self, "sampling", sampling) and not loo_correction
        check_choice(self, "kernel", kernel, ("auto", "ggn", "margin"))
        self.kernel = kernel
        self.directions = check_int(self, "directions", directions, minimum=1)
        if kernel == "ggn" and (loo_correction or not newton_weights):
            raise ValueError(
                'Expected argument `kernel` of TRAK not to be "ggn" with `newton_weights=False`, which leaves the '
                "curvature out, or with `loo_correction=True`, which is exact for one row a sample."
            )

    def wants_directions(self, curvature: str) -> bool:
        """Say whether the kernel has second directions of an output.

        Args:
            curvature: how its Gauss-Newton matrix is known, see :attr:`lightning_attr.outputs.ModelOutput.curvature`.

        Returns:
            True if it has.

        Raises:
            ValueError: if they are asked for, but not known.
        """
        if self.kernel == "ggn" and curvature == "unknown":
            raise ValueError(
                'Expected a model output with a second direction for `kernel="ggn"`, but that of this module has none, '
                "as a loss without the mixin, NegativeLoss, and an output of your own that does not override "
                '`second_direction`. Use `kernel="auto"`, or "margin".'
            )
        one_row = self.kernel == "margin" or not self.newton_weights or self.loo_correction
        return not one_row and curvature in {"rest", "whole"}

    def settled(self, n_train: int, numel: int) -> TRAK:
        """Choose how many features there are, where nobody said; see :func:`lightning_attr.methods.choice.settled`.

        Args:
            n_train: training samples.
            numel: parameters of the model, frozen or not.

        Returns:
            The method, with nothing left to choose.
        """
        if not self._open or self.projector is None:
            return self
        own = copy.copy(self)
        own._open, own.choice = False, choose_features(n_train, numel)
        own.projector = type(self.projector)(own.choice.proj_dim, self.projector.seed)
        return own

    def given(self, projector: Projector) -> TRAK:
        """Take a projector, if nobody chose one; see :func:`lightning_attr.methods.stored_projection.on_store`.

        Args:
            projector: of the features that there are.

        Returns:
            The method, with nothing left to choose; as it is, where somebody chose.
        """
        if not self._open or self.projector is None:
            return self
        own = copy.copy(self)
        own._open, own.projector = False, projector
        return own

    def damping_at(self, snapshot: SnapshotFeatures) -> float:
        """Give the damping as a multiple of the mean diagonal entry; see :meth:`DampedMethod.damping_at`.

        Args:
            snapshot: that is scored.

        Returns:
            The one given or chosen. Where the number of features is chosen, too, the scores do not hang on it: the
            ridge is that of 2,048.
        """
        damping = super().damping_at(snapshot)
        return damping if self.choice is None else damping * snapshot.targets["features"].shape[1] / MOST_FEATURES

    @property
    def config(self) -> dict[str, Any]:
        """Name and arguments, and what was chosen and why; see :meth:`AttributionMethod.config`."""
        own = {name: value for name, value in super().config.items() if name not in {"_open", "choice"}}
        return own if self.choice is None else {**own, "choice": self.choice.reason}

    def kernel_weights(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        """Weigh by the curvature of the loss, or not at all; see :meth:`KernelMethod.kernel_weights`.

        Args:
            columns: of the store.

        Returns:
            ``(b,)``, or None.
        """
        return columns["newton_weight"] if self.newton_weights else None

    def second_directions(self, curvature: str) -> int:
        """Store :attr:`directions` where the kernel has them; see :meth:`AttributionMethod.second_directions`.

        Args:
            curvature: as there.

        Returns:
            How many.
        """
        return self.directions if self.wants_directions(curvature) and not self.exact else 0

    def beside(self, snapshot: SnapshotFeatures, columns: Mapping[str, Tensor]) -> Tensor | None:
        """Give the second directions, where the kernel has them; see :meth:`KernelMethod.beside`.

        Args:
            snapshot: as there.
            columns: as there.

        Returns:
            Features, or None.
        """
        if not snapshot.directions or not self.wants_directions(snapshot.curvature):
            return None
        rows = columns["second_features"].flatten(0, 1)
        return rows if rows[:, 0].all() else rows[rows.any(1)]  # samples without any have zeros

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Average over the snapshots; see :meth:`AttributionMethod.score`.

        Kernels are products of blocks in the features' precision, added up and factored in float64.

        Args:
            snapshots: in the order of training.

        Yields:
            Scores, block after block.

        Raises:
            ValueError: if a kernel is singular, or not finite, or a leverage leaves nothing to divide by.
        """
        plain = not (self.balanced and self.newton_weights)
        if self.exact:
            yield from self._exact(snapshots, plain)
            return
        for snapshot in snapshots:
            self._say_kernel(snapshot, snapshot.directions)
        kernels = [self.solve(snapshot) for snapshot in snapshots]
        weights = [1 / len(kernels)] * len(kernels) if plain else self.balanced_weights(snapshots, kernels)
        for rows, train in in_step(snapshots):
            m = len(snapshots[0].targets["features"])
            like = kernels[0].targets
            scores, self_influence, push = (like.new_zeros(size) for size in ((len(rows), m), len(rows), len(rows)))
            for columns, kernel, weight in zip(train, kernels, weights, strict=True):
                features, q = columns["features"].to(like), columns["out_to_loss"].to(like)
                leverage = kernel.leverage(features, rows)
                if self.loo_correction:
                    left = self._left(leverage, columns, rows)
                    leverage, features = leverage / left, features / left[:, None]
                if self.newton_weights:
                    leverage = q * leverage
                _add_product(
                    scores, features, kernel.targets, weight * (q if self.newton_weights else torch.ones_like(q))
                )
                self_influence += weight * leverage
                push += weight * q
            if not self.newton_weights:
                scores, self_influence = scores * push[:, None], self_influence * push
            yield ScoreBlock(rows, scores, self_influence)

    def _exact(self, snapshots: Sequence[SnapshotFeatures], plain: bool) -> Iterator[ScoreBlock]:
        scores = self_influence = push = torch.zeros(())
        sizes = []
        for snapshot in snapshots:
            kernel = self._dual(snapshot)
            ridge = self.damping_at(snapshot) * kernel.kernel.diagonal().sum().item() / self.proj_dim
            solved = kernel.solve(snapshot, ridge)
            if solved.dimension is not None:
                snapshot.evidence["effective_dimension"] = solved.dimension
            terms, leverage, q = solved.terms, solved.leverage, kernel.columns["out_to_loss"]
            if self.loo_correction:
                left = self._left(leverage, kernel.columns, range(len(leverage)))
                leverage, terms = leverage / left, terms / left[:, None]
            if self.newton_weights:
                leverage, terms = q * leverage, q[:, None] * terms
            sizes.append(1.0 if plain else leverage.abs().double().mean().item())
            weight = 1 / (sizes[-1] or 1.0)
            scores = scores + weight * terms
            self_influence = self_influence + weight * leverage
            push = push + weight * q
        total = balanced_total(sizes)
        if not self.newton_weights:
            scores, self_influence = scores * push[:, None] / total, self_influence * push / total
        for rows in kernel.own:
            own = slice(rows.start, rows.stop)
            yield ScoreBlock(rows, scores[own] / total, self_influence[own] / total)

    def _say_kernel(self, snapshot: SnapshotFeatures, directions: int) -> None:
        """Note which kernel there is; refuse features that lack what was asked for."""
        wanted = self.wants_directions(snapshot.curvature)
        if wanted and not directions and self.kernel == "ggn":
            raise ValueError(
                f'Expected features with second directions for `kernel="ggn"`, but those of snapshot {snapshot.key!r} '
                'were stored without, by another method or an earlier version. Use `kernel="auto"`, which scores them '
                "by the kernel that they have, or fit with another directory."
            )
        if self.newton_weights:
            whole = snapshot.curvature == "newton" or (wanted and directions)
            snapshot.evidence["kernel"] = "ggn" if whole else "margin"

    def _dual(self, snapshot: SnapshotFeatures) -> DualKernel:
        self._say_kernel(snapshot, self.directions)
        if not self.wants_directions(snapshot.curvature):
            return DualKernel.at(snapshot, self.newton_weights)
        return GaussNewtonKernel.kept(snapshot, self.directions, snapshot.curvature == "whole")

    def _left(self, leverage: Tensor, columns: Mapping[str, Tensor], rows: range) -> Tensor:
        """Share of its own fit that a sample leaves to the others, ``(b,)``."""
        weights = self.kernel_weights(columns)
        left = 1 - (leverage if weights is None else leverage * weights.to(leverage))
        alone = (~(left > 16 * torch.finfo(left.dtype).eps)).nonzero().flatten().tolist()
        if alone:
            raise ValueError(
                f"Expected leverages below 1 for `loo_correction=True`, but that of training sample "
                f"{rows[alone[0]]} is {1 - left[alone[0]].item():.6g}: nothing but itself determines its output, so "
                "that there is no solution without it. Raise the damping, or lower `proj_dim`."
            )
        return left


def _add_product(scores: Tensor, features: Tensor, solved: Tensor, factors: Tensor) -> None:
    """Add ``diag(factors) features solved`` to scores; the smaller matrix is scaled."""
    if solved.shape[1] < features.shape[1]:
        scores.addcmul_(features @ solved, factors[:, None])
    else:
        scores.addmm_(factors[:, None] * features, solved)
