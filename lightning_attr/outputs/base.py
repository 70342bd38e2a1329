r"""Model outputs: the scalar :math:`f(z; \theta)` of a sample that is attributed, and how the loss depends on it.

A training sample pushes the model along :math:`\nabla \ell = -q \nabla f` with :math:`q = -d\ell/df`: a direction
:math:`\nabla f`, and how hard the sample pushes, :math:`q`, which vanishes once the sample is fitted
(Park et al., 2023, TRAK, section 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from lightning_attr.batches.late_checks import noted
from lightning_attr.outputs.directions import SampleDraws


class ModelOutput(ABC):
    r"""What is attributed: three batched functions of the module's outputs and targets, each sample on its own.

    The three are tied by one identity, :math:`\nabla\ell = -q \nabla f`, which
    :func:`lightning_attr.testing.check_model_output` tests for an output of your own.

    Example:
        >>> import torch
        >>> class SquaredError(ModelOutput):          # the loss itself, attributed as its negative
        ...     def loss(self, outputs, targets):
        ...         return (outputs - targets).square().mean(dim=1)
        ...     def output(self, outputs, targets):
        ...         return -self.loss(outputs, targets)
        ...     def out_to_loss(self, outputs, targets):
        ...         return torch.ones(len(outputs))
        >>> SquaredError().output(torch.zeros(2, 3), torch.ones(2, 3))
        tensor([-1., -1.])
    """

    @property
    def exact(self) -> bool:
        r"""Whether the loss depends on the outputs through ``f`` alone, so that the identity holds.

        A subclass whose ``q`` approximates says False, and is not held to it.

        Example:
            >>> from lightning_attr.outputs import LanguageModel
            >>> LanguageModel("loss").exact, LanguageModel("sum_of_margins").exact
            (True, False)
        """
        return True

    @abstractmethod
    def output(self, outputs: Any, targets: Any) -> Tensor:
        """Compute what is attributed; a higher value is more of the behaviour.

        Args:
            outputs: what the module returns for a batch of ``b`` samples, by default a ``(b, ...)`` float tensor.
            targets: what it is compared with.

        Returns:
            ``f``, float, of shape ``(b,)``.
        """

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Compute the training loss of each sample, as it enters the training objective.

        Args:
            outputs: as in :meth:`output`.
            targets: as in :meth:`output`.

        Returns:
            The loss, float, of shape ``(b,)``.
        """

    @abstractmethod
    def out_to_loss(self, outputs: Any, targets: Any) -> Tensor:
        r"""Compute :math:`q = -d\ell/df`: how much the loss of a sample falls when its output rises.

        Args:
            outputs: as in :meth:`output`.
            targets: as in :meth:`output`.

        Returns:
            ``q``, float, of shape ``(b,)``; positive when a higher output lowers the loss.
        """

    def newton_weight(self, outputs: Any, targets: Any) -> Tensor:
        r"""Compute :math:`d^2\ell/df^2`, the weight of a sample in a Newton kernel.

        Where the loss is not curved in the output (``NegativeLoss``), every sample weighs one.

        Args:
            outputs: as in :meth:`output`.
            targets: as in :meth:`output`.

        Returns:
            Non-negative float tensor of shape ``(b,)``.
        """
        return torch.ones_like(self.out_to_loss(outputs, targets))

    @property
    def curvature(self) -> str:
        r"""How the Gauss-Newton matrix :math:`G = J^\top \nabla^2 \ell\, J` of a sample's loss is known.

        ==========  ================================================================================================
        "newton"    :math:`w \nabla f \nabla f^\top` is all of it: one output, as of a binary classifier
        "rest"      :math:`w \nabla f \nabla f^\top + E[g g^\top]`, with the gradient :math:`g` of
                    :meth:`second_direction`
        "whole"     :math:`E[g g^\top]`
        "unknown"   not at all; by default, of a class without a second direction
        ==========  ================================================================================================

        Example:
            >>> from lightning_attr.outputs import BinaryMargin, MulticlassMargin
            >>> BinaryMargin().curvature, MulticlassMargin().curvature
            ('newton', 'rest')
        """
        return "unknown" if type(self).second_direction is ModelOutput.second_direction else "whole"

    def second_direction(self, outputs: Any, targets: Any, draws: SampleDraws) -> Tensor:
        r"""Draw a scalar whose gradient :math:`g` has the second moments that :attr:`curvature` says.

        Its value means nothing. :func:`lightning_attr.outputs.softmax_direction` draws what a softmax needs.

        Args:
            outputs: as in :meth:`output`; the gradient is taken through them.
            targets: as in :meth:`output`.
            draws: random numbers of each sample.

        Returns:
            Float, of shape ``(b,)``.

        Raises:
            NotImplementedError: unless a subclass has one.
        """
        name = type(self).__name__
        raise NotImplementedError(
            f"{name} has no second direction, from which the Gauss-Newton matrix of its loss is made. Use "
            f'`kernel="margin"`, or override `{name}.second_direction`.'
        )

    def values(self, outputs: Any, targets: Any, output: Tensor) -> dict[str, Tensor]:
        """Compute all that the store keeps beside the output; an output of its own may do it at once.

        Args:
            outputs: as in :meth:`output`.
            targets: as in :meth:`output`.
            output: what :meth:`output` returned for them, ``(b,)``.

        Returns:
            ``loss``, ``out_to_loss`` and ``newton_weight``, each ``(b,)``.
        """
        return {
            "loss": self.loss(outputs, targets),
            "out_to_loss": self.out_to_loss(outputs, targets),
            "newton_weight": self.newton_weight(outputs, targets),
        }

    def distribution(self, outputs: Any, targets: Any) -> Distribution:
        """Give the model's own distribution of the targets, whose negative log-likelihood the loss is.

        The true Fisher takes its labels from it.

        Args:
            outputs: as in :meth:`output`.
            targets: as in :meth:`output`; the distribution does not depend on their values.

        Returns:
            A ``Categorical``, ``Bernoulli`` or ``Normal`` whose samples have the shape of the targets, float64.

        Raises:
            NotImplementedError: unless a subclass has one.
        """
        name = type(self).__name__
        raise NotImplementedError(
            f"{name} does not say which distribution of targets its loss belongs to, from which the true Fisher takes "
            'its labels. Use the empirical Fisher, of the observed labels (`curvature="empirical_fisher"`, or '
            f'`labels="observed"` in lightning_attr.func), or override `{name}.distribution`.'
        )

    def relabelled(self, targets: Any, drawn: Tensor) -> Any:
        """Put labels drawn from :meth:`distribution` in the places of the observed ones.

        Args:
            targets: as in :meth:`output`.
            drawn: labels, of the distribution's shape.

        Returns:
            Targets as :meth:`output` takes them; by default the drawn labels as they are.
        """
        return drawn


def curvature_of(model_output: ModelOutput) -> str:
    """Say how a model output gives the Gauss-Newton matrix of its loss.

    A subclass that changes loss, output or their derivatives, and not its curvature, has none that is known.

    Args:
        model_output: any.

    Returns:
        As :attr:`ModelOutput.curvature`.

    Example:
        >>> from lightning_attr.outputs import MulticlassMargin, Regression
        >>> class Focal(MulticlassMargin):
        ...     def loss(self, outputs, targets):
        ...         return super().loss(outputs, targets) ** 2
        >>> curvature_of(MulticlassMargin()), curvature_of(Regression()), curvature_of(Focal())
        ('rest', 'newton', 'unknown')
    """
    order = type(model_output).__mro__
    changed = min(_place(order, name) for name in ("output", "loss", "out_to_loss", "newton_weight"))
    told = min(_place(order, name) for name in ("curvature", "second_direction"))
    return model_output.curvature if told <= changed else "unknown"


def _place(order: tuple[type[Any], ...], name: str) -> int:
    """Where the first class is that defines a name, from the most derived on."""
    return next(i for i, owner in enumerate(order) if name in vars(owner))


def at_least_float32(values: Tensor) -> Tensor:
    """Give values a dtype in which margins do not saturate.

    Returns float32, or wider if they are.

    Example:
        >>> at_least_float32(torch.ones(1, dtype=torch.float16)).dtype
        torch.float32
    """
    # Half-precision margins saturate: q would be 0 for most fitted samples.
    return values.to(torch.promote_types(values.dtype, torch.float32))


def one_column(name: str, values: Tensor) -> Tensor:
    """Take one value per sample.

    Shapes: values (b,). Returns ``(b,)``, float32 or wider if floating.

    Example:
        >>> one_column("Regression", torch.ones(2, 1)).shape
        torch.Size([2])
    """
    if values.ndim == 2 and values.shape[1] == 1:
        values = values.squeeze(1)
    if values.ndim != 1:
        raise ValueError(
            f"Expected outputs and targets for {name} of shape (b,) or (b, 1), but got {tuple(values.shape)}. "
            "For several outputs a sample use NegativeLoss, or a ModelOutput of your own."
        )
    return at_least_float32(values) if values.dtype.is_floating_point else values


def describe(found: object) -> str:
    """Say what was found where a tensor is wanted, for a message.

    Returns dtype and shape of a tensor, the type of anything else.

    Example:
        >>> describe(torch.ones(2)), describe([1])
        ('torch.float32 of shape (2,)', 'list')
    """
    return f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__


def bad_labels(labels: Tensor, labelled: Tensor, classes: int) -> tuple[list[int], list[list[int]]]:
    """Find labels without logits before they are looked up: on a GPU that ends the process.

    Shapes: labels (b, n), labelled (b, n). Returns samples none of whose labels counts, and the places ``[sample,
    position]`` of labels that are no class.
    """
    outside = labelled & ((labels < 0) | (labels >= classes))
    empty = ~labelled.any(1)
    wrong = (outside.any(1) | empty).any()
    if noted(wrong):
        return [], []
    try:
        if not wrong:
            return [], []
    except RuntimeError:
        return [], []
    return empty.nonzero().flatten().tolist(), outside.nonzero().tolist()
