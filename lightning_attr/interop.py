"""Other libraries on what a run has stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lightning_attr.arguments.checks import check_choice, check_path
from lightning_attr.errors import MissingDependencyError
from lightning_attr.gradients.functional import call_with
from lightning_attr.objectives.mixin import AttributionMixin
from lightning_attr.objectives.objective import check_module
from lightning_attr.parameters.weights import load_weights
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.user_code.training_step import training_loss

if TYPE_CHECKING:
    from dattri.task import AttributionTask

__all__ = ["dattri_task"]

_Function = Callable[[Mapping[str, Tensor], Any], Tensor]


def dattri_task(
    store: FeatureStore | str | Path, module: nn.Module, train: Literal["loss", "output"] = "loss"
) -> AttributionTask:
    r"""Make an attribution task for dattri from the snapshots of a run.

    dattri's attributors then work at the weights that ours work at. The task's target function is the module's own
    model output ``f``, and its checkpoints are the names of the snapshots, in the order of training.

    Signs: what ``TracInAttributor`` adds up is :math:`\nabla\ell_i \cdot \nabla f_j`, **minus** what we call a score.
    With weights of one, ``normalized_grad=False`` and without projection it gives the negative of
    :class:`lightning_attr.methods.GradDot`, summed over snapshots; weights for TracIn are the ``learning_rate`` of
    ``store.snapshots``. (dattri 0.3.0 projects to 512 dimensions unless ``attributor.projector_kwargs = None`` is set
    afterwards.) For ``TRAKAttributor``, take ``train="output"`` and say what the probability of the right class is: for
    margins ``lambda params, sample: task.original_target_func(params, sample).sigmoid()``; its sign is ours.

    Both functions take one sample, a tuple of tensors without the dimension of the batch, as attributors do that go
    sample by sample: TracIn, TRAK, RPS. Those that call the loss on a whole batch need a function of their own. The
    task puts the module into eval mode and changes its weights; pass a copy to keep them.

    Args:
        store: a store, or its directory.
        module: the module that was trained; its batches are tuples or lists of tensors.
        train: what dattri takes gradients of for training samples: "loss", the training loss, or "output", ``f``.

    Returns:
        The task.

    Raises:
        MissingDependencyError: if dattri is not installed.
        StoreMismatchError: if the last snapshot does not fit the module.
        TypeError: if the module cannot be attributed.
        ValueError: if the store has no snapshots, or ``train`` is neither.

    Example:
        >>> from lightning_attr.interop import dattri_task
        >>> task = dattri_task("attribution", module)  # doctest: +SKIP
        >>> tracin = TracInAttributor(task, [s.learning_rate for s in store.snapshots], False)  # doctest: +SKIP
    """
    check_choice("dattri_task", "train", train, ("loss", "output"))
    if not isinstance(store, FeatureStore):
        store = check_path("dattri_task", "store", store, also="a FeatureStore")
    try:
        from dattri.task import AttributionTask
    except ImportError as error:
        raise MissingDependencyError("This needs dattri, which is not installed. Run `pip install dattri`.") from error
    check_module(module)
    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    if not opened.snapshots:
        raise ValueError(f"Expected a store with snapshots, but {opened.path} has none. Fit with AttributionCallback.")

    def load(model: nn.Module, key: str) -> nn.Module:
        load_weights(model, opened.weights(key))
        return model.eval()

    keys = [snapshot.key for snapshot in opened.snapshots]
    load(module, keys[-1])  # refused here rather than in the midst of a run
    output = _of_sample(module, _output)
    loss = output if train == "output" else _of_sample(module, _loss)
    return AttributionTask(loss, module, keys, target_func=output, checkpoints_load_func=load)


def _of_sample(module: nn.Module, function: Callable[[Any, Any], Tensor]) -> _Function:
    def at(params: Mapping[str, Tensor], sample: Any) -> Tensor:
        batch = type(sample)(tensor.unsqueeze(0) for tensor in sample)
        value: Tensor = call_with(module, params, lambda batch: function(module, batch), batch)
        return value.reshape(())

    return at


def _output(module: Any, batch: Any) -> Tensor:
    if isinstance(module, AttributionMixin):
        return module.model_output.output(*module.attribution_step(batch))
    return -training_loss(module, batch)


def _loss(module: Any, batch: Any) -> Tensor:
    if isinstance(module, AttributionMixin):
        return module.model_output.loss(*module.attribution_step(batch))
    return training_loss(module, batch)
