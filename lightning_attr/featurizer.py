"""From a batch to rows of the store: model output, its per-sample gradient, projected, and the values beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_attr.errors import NonFiniteGradientError
from lightning_attr.gradients import (
    GradientPlan,
    ParameterGradient,
    check_batch_independence,
    hooked_gradients,
    loop_gradients,
    plan_gradients,
    vmap_gradients,
)
from lightning_attr.gradients.rules import check_layers
from lightning_attr.outputs import ModelOutput
from lightning_attr.projectors import Projection
from lightning_attr.testing import check_model_output

__all__ = ["Featurizer", "plan"]

PROBE_SIZE = 4
"""Samples with which a module is checked before anything is featurized."""


def plan(module: Any, batch: Any, batch_size: int) -> GradientPlan:
    """Check a module on a few samples and choose the gradient path of each parameter.

    Args:
        module: an ``nn.Module`` with :class:`lightning_attr.AttributionMixin`, in eval mode.
        batch: a few samples, on the module's device.
        batch_size: number of samples in it.

    Returns:
        The plan that :class:`Featurizer` follows.

    Raises:
        AssertionError: if the functions of its model output do not belong together.
        BatchDependenceError: if samples of a batch affect each other.
        NonFiniteGradientError: if an output or a gradient is NaN or Inf.
        TypeError: if the module has no attribution step.
        UnsupportedLayerError: if a layer has no per-sample gradients in its state, such as BatchNorm in train mode.
        ValueError: if the model output has not one value a sample.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, nn.Linear): ...
        >>> plan(Classifier(2, 3).eval(), (torch.randn(4, 2), torch.tensor([0, 1, 2, 0])), 4).hooked
        ('weight', 'bias')
    """
    check_module(module)
    check_layers(module)

    def forward(batch: Any) -> Tensor:
        output: Tensor = module.model_output.output(*module.attribution_step(batch))
        return output

    check_batch_independence(forward, batch, batch_size)
    with torch.no_grad():
        outputs, targets = module.attribution_step(batch)
    check_model_output(module.model_output, outputs, targets, dtype=None)
    return plan_gradients(module, forward, lambda p, b: module.functional_output(p, {}, b), batch, batch_size)


def check_module(module: Any) -> None:
    """Check that a module can be attributed at all.

    Args:
        module: any object.

    Raises:
        TypeError: if it has no attribution step.

    Example:
        >>> from torch import nn
        >>> check_module(nn.Linear(1, 1))
        Traceback (most recent call last):
        ...
        TypeError: Expected Linear to have lightning_attr.AttributionMixin among its bases...
    """
    if not (isinstance(module, nn.Module) and hasattr(module, "attribution_step") and hasattr(module, "model_output")):
        name = type(module).__name__
        raise TypeError(
            f"Expected {name} to have lightning_attr.AttributionMixin among its bases, but it has no "
            f"`attribution_step`. Write `class {name}(AttributionMixin, LightningModule)`."
        )


class Featurizer:
    r"""Computes the rows of one snapshot, :math:`\phi = P \nabla f` and the values beside it.

    Args:
        module: an ``nn.Module`` with :class:`lightning_attr.AttributionMixin`, in eval mode, at the snapshot's weights.
        plan: from :func:`plan`, made once for all snapshots.
        projection: the snapshot's.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_attr import AttributionMixin
        >>> from lightning_attr.layout import ParameterLayout
        >>> from lightning_attr.projectors import IdentityProjector
        >>> class Classifier(AttributionMixin, nn.Linear): ...
        >>> module, batch = Classifier(2, 3).eval(), (torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> projection = IdentityProjector().bind(ParameterLayout.of(module), "final")
        >>> rows = Featurizer(module, plan(module, batch, 4), projection)(batch, [0, 1, 2, 3])
        >>> {name: tuple(values.shape) for name, values in rows.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'features': (4, 9), 'output': (4,), 'loss': (4,), 'out_to_loss': (4,), 'newton_weight': (4,), 'label': (4,)}
    """

    def __init__(self, module: Any, plan: GradientPlan, projection: Projection) -> None:
        self.module = module
        self.plan = plan
        self.projection = projection
        trainable = next(p for p in module.parameters() if p.requires_grad)
        self.dtype = torch.promote_types(trainable.dtype, torch.float32)
        self.fallback = {name: p for name, p in module.named_parameters() if name in plan.fallback}

    def __call__(self, batch: Any, rows: Sequence[int]) -> dict[str, Tensor]:
        """Featurize a batch.

        Args:
            batch: ``b`` samples, on the module's device.
            rows: their row numbers, for error messages.

        Returns:
            Column name -> values: ``features`` ``(b, dim)``, and ``output``, ``loss``, ``out_to_loss``,
            ``newton_weight``, each ``(b,)``, float32 (float64 for a float64 module); ``label`` ``(b,)`` int64 if the
            targets are class labels.

        Raises:
            NonFiniteGradientError: if a row holds NaN or Inf.
        """
        b, device = len(rows), next(self.module.parameters()).device
        features = torch.zeros(b, self.projection.dim, dtype=self.dtype, device=device)
        seen: dict[str, Any] = {}

        def add(name: str, gradient: ParameterGradient) -> None:
            self.projection.accumulate(features, name, gradient)

        def forward() -> Tensor:
            seen["outputs"], seen["targets"] = self.module.attribution_step(batch)
            output: Tensor = self.module.model_output.output(seen["outputs"], seen["targets"])
            return output

        output = hooked_gradients(self.module, forward, b, self.plan.hooked, add)
        for name, gradient in self._fallback_gradients(batch, b).items():
            add(name, gradient.to(self.dtype))
        columns = {"features": features, "output": output, **self._values(**seen)}
        _check_finite(columns, rows)
        return {name: values if name == "label" else values.to(self.dtype) for name, values in columns.items()}

    def _values(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """What the model output says of each sample, without gradients."""
        model_output: ModelOutput = self.module.model_output
        with torch.no_grad():
            values = {
                "loss": model_output.loss(outputs, targets),
                "out_to_loss": model_output.out_to_loss(outputs, targets),
                "newton_weight": model_output.newton_weight(outputs, targets),
            }
        integral = isinstance(targets, Tensor) and not (targets.dtype.is_floating_point or targets.dtype.is_complex)
        if integral and targets.shape == values["loss"].shape:
            values["label"] = targets.long()
        return values

    def _fallback_gradients(self, batch: Any, batch_size: int) -> dict[str, Tensor]:
        if not self.fallback:
            return {}

        def functional_output(params: Mapping[str, Tensor], batch: Any) -> Tensor:
            output: Tensor = self.module.functional_output(params, {}, batch)
            return output

        per_sample = vmap_gradients if self.plan.vectorised else loop_gradients
        # The plan was checked outside autocast, and vmap cannot run all layers inside it (BatchNorm mixes dtypes).
        with torch.autocast(next(iter(self.fallback.values())).device.type, enabled=False):
            return per_sample(functional_output, self.fallback, batch, batch_size)


def _check_finite(columns: Mapping[str, Tensor], rows: Sequence[int]) -> None:
    # One pass and one synchronisation: a NaN or Inf anywhere makes the sum one.
    if torch.stack([values.sum(dtype=torch.float32) for values in columns.values()]).isfinite().all():
        return
    for name, values in columns.items():
        finite = values.isfinite().reshape(len(rows), -1).all(1)
        if not finite.all():
            bad = [rows[i] for i in (~finite).nonzero().flatten().tolist()]
            what = "gradient" if name == "features" else name
            raise NonFiniteGradientError(
                f"The {what} of sample {', '.join(map(str, bad[:8]))}{' ...' if len(bad) > 8 else ''} is NaN or Inf "
                f"({len(bad)} of the {len(rows)} samples of its batch). Look at dataset[{bad[0]}], and at the "
                "training: a diverged model has no attribution."
            )
