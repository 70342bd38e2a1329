"""TRAK over the snapshots of a run."""

from __future__ import annotations

from lightning_attr.arguments.checks import check_choice, check_flag, check_int
from lightning_attr.methods.choice import MOST_FEATURES
from lightning_attr.methods.ensemble_scores import EnsembleScores
from lightning_attr.methods.support.subset_truth import SubsetTruth
from lightning_attr.projectors import Projector
from lightning_attr.projectors.eigen import DefaultProjector


class TRAK(EnsembleScores):
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
        >>> from lightning_attr.methods import SnapshotFeatures
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
        self.choice = None
        self.newton_weights = check_flag(self, "newton_weights", newton_weights)
        self.balanced = check_flag(self, "balanced", balanced)
        self.loo_correction = check_flag(self, "loo_correction", loo_correction)
        self.sampling = check_flag(self, "sampling", sampling) and not loo_correction
        check_choice(self, "kernel", kernel, ("auto", "ggn", "margin"))
        self.kernel = kernel
        self.directions = check_int(self, "directions", directions, minimum=1)
        self.check_kernel()
