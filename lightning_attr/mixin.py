"""The functional output of a module, from two small parts that a user may override."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from lightning_attr.gradients.functional import call_with
from lightning_attr.outputs import ModelOutput, MulticlassMargin

__all__ = ["AttributionMixin"]


class AttributionMixin:
    r"""Gives a ``LightningModule`` its model output :math:`f(z; \theta)` and per-sample loss.

    Put it before ``LightningModule`` in the bases. For a classifier of ``(x, y)`` batches nothing else is to be
    written; for anything else override :meth:`attribution_step`, ``model_output``, or both.

    Attributes:
        model_output: what is attributed; the multi-class margin by default.

    Example:
        >>> import lightning as L, torch
        >>> from torch import nn
        >>> from lightning_attr.outputs import Regression
        >>> class Line(AttributionMixin, L.LightningModule):
        ...     model_output = Regression()
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(1, 1, bias=False)
        ...     def attribution_step(self, batch):
        ...         return self.linear(batch["x"]), batch["y"]
        >>> batch = {"x": torch.tensor([[1.0], [2.0]]), "y": torch.zeros(2)}
        >>> Line().functional_output({"linear.weight": torch.tensor([[3.0]])}, {}, batch)
        tensor([3., 6.])
    """

    model_output: ModelOutput = MulticlassMargin()

    def attribution_step(self, batch: Any) -> tuple[Any, Any]:
        """Run the module on a batch, as training does, without reducing over samples or logging.

        Args:
            batch: what the data loader yields, on the module's device.

        Returns:
            ``(outputs, targets)`` as ``model_output`` takes them; here ``(self(x), y)`` for a batch ``(x, y)``.

        Raises:
            TypeError: if the batch is not a pair.
        """
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise TypeError(
                f"Expected a batch (x, y), but got {_describe(batch)}. Override `attribution_step(self, batch)` in "
                f"{type(self).__name__} to return (outputs, targets) for such a batch."
            )
        x, y = batch
        return cast(nn.Module, self)(x), y

    def functional_output(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Compute the model output at given weights; the module's own are left alone.

        Args:
            params: parameter name -> tensor; names that are missing keep the module's own.
            buffers: buffer name -> tensor, likewise.
            batch: a batch of ``b`` samples.

        Returns:
            ``f``, float, ``(b,)``.
        """
        outputs, targets = self._call_step(params, buffers, batch)
        return self.model_output.output(outputs, targets)

    def functional_loss(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Compute the loss of each sample at given weights.

        Args:
            params: as in :meth:`functional_output`.
            buffers: as in :meth:`functional_output`.
            batch: a batch of ``b`` samples.

        Returns:
            The loss, float, ``(b,)``.
        """
        outputs, targets = self._call_step(params, buffers, batch)
        return self.model_output.loss(outputs, targets)

    def _call_step(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Any) -> tuple[Any, Any]:
        called = call_with(cast(nn.Module, self), {**params, **buffers}, self.attribution_step, batch)
        return cast("tuple[Any, Any]", called)


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with the keys {sorted(map(str, batch))}"
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    return f"a {type(batch).__name__}{size}"
