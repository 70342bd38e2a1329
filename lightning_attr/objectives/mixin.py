"""The functional output of a module, from two small parts that a user may override."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import Any, cast

from torch import Tensor, nn

from lightning_attr.gradients.functional import call_with
from lightning_attr.outputs import ModelOutput, MulticlassMargin
from lightning_attr.randomness.draws import Draw, Samples
from lightning_attr.user_code.calls import called


class AttributionMixin:
    r"""Gives a ``LightningModule`` its model output :math:`f(z; \theta)` and per-sample loss.

    Put it before ``LightningModule`` in the bases. For a classifier of ``(x, y)`` batches, or of those of transformers,
    nothing else is to be written; for anything else override :meth:`attribution_step`, ``model_output``, or both.

    Attributes:
        model_output: what is attributed; the multi-class margin by default.
        attribution_draws: how many draws of :meth:`attribution_batch` a sample is averaged over.

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
    attribution_draws: int = 1

    def attribution_setup(self, samples: Samples, snapshot: str) -> None:
        """Compute what model outputs at a snapshot need of the training samples, a bank of embeddings for instance.

        It runs once a snapshot, in eval mode and without gradients. By default there is nothing to do.

        Args:
            samples: the training samples.
            snapshot: key of the snapshot.
        """

    def attribution_batch(self, batch: Any, draw: Draw) -> Any:
        """Complete a batch with what is random about its samples: noise, timesteps, simulated batches.

        Everything random has to come from ``draw``; :meth:`attribution_step` itself is a function of the batch. What is
        attributed is the mean over ``attribution_draws`` draws.

        Args:
            batch: what the data loader yields, on the module's device.
            draw: gives random numbers that are each sample's own.

        Returns:
            What :meth:`attribution_step` takes; by default the batch as it is.
        """
        return batch

    def attribution_step(self, batch: Any) -> tuple[Any, Any]:
        """Run the module on a batch, as training does, without reducing over samples or logging.

        By default it takes a batch ``(x, y)``, or one that a collator of transformers gives, with ``labels``, if the
        module's ``forward`` takes its keys. A module that keeps its model in an attribute says so::

            def attribution_step(self, batch):
                return self.model(**batch).logits, batch["labels"]

        Args:
            batch: what the data loader yields, on the module's device, as :meth:`attribution_batch` completed it.

        Returns:
            ``(outputs, targets)`` as ``model_output`` takes them; here ``(self(x), y)``, or ``(self(**batch).logits,
            batch["labels"])``.

        Raises:
            TypeError: if the batch is neither, holds lists where tensors are needed, or does not fit ``forward``.
        """
        if isinstance(batch, Mapping) and "labels" in batch:
            return _logits(cast(nn.Module, self), batch), batch["labels"]
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
        called = call_with(cast(nn.Module, self), {**params, **buffers}, partial(attribution_outputs, self), batch)
        return cast("tuple[Any, Any]", called)


def attribution_outputs(module: Any, batch: Any) -> tuple[Any, Any]:
    """Run the attribution step of a module, and leave no trace of it.

    Returns ``(outputs, targets)``.

    Example:
        >>> import torch
        >>> class Classifier(AttributionMixin, nn.Linear): ...
        >>> attribution_outputs(Classifier(2, 3), (torch.ones(4, 2), torch.zeros(4)))[0].shape
        torch.Size([4, 3])
    """
    outputs, targets = called(module, "attribution_step", module.attribution_step, batch)
    return outputs, targets


_OF_AN_ATTRIBUTE = """With the model in an attribute, override

    def attribution_step(self, batch):
        return self.model(**batch).logits, batch["labels"]
"""


def _logits(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Call a module with the keys of a batch, as its training does."""
    name = type(module).__name__
    ragged = [key for key in ("labels", "input_ids") if isinstance(batch.get(key), (list, tuple))]
    if ragged:
        raise TypeError(
            f"Expected `{ragged[0]}` of the batch to be a tensor of shape (b, ...), but got a list: nobody padded the "
            "sequences. Give the data loader a collator that does and returns tensors, such as transformers' "
            "DataCollatorForSeq2Seq, and the tokenizer a padding token (`tokenizer.pad_token = tokenizer.eos_token`)."
        )
    try:
        signature(module.forward).bind(**batch)
    except TypeError as error:
        raise TypeError(
            f"Expected `forward` of {name} to take the keys of the batch, {sorted(batch)}, but {error}. "
            f"{_OF_AN_ATTRIBUTE}"
        ) from error
    try:
        outputs = module(**batch)
    except TypeError as error:
        if "_forward_unimplemented" not in str(error):  # what torch has in the place of a forward
            raise
        raise TypeError(f"Expected {name} to have a `forward`, but it has none. {_OF_AN_ATTRIBUTE}") from error
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"Expected {name} to return logits, or an object that has them as `logits`, for a batch with `labels`, but "
            f"got a {type(outputs).__name__}. {_OF_AN_ATTRIBUTE}"
        )
    return logits


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with the keys {sorted(map(str, batch))}"
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    return f"a {type(batch).__name__}{size}"
