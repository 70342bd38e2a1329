"""The predict-style step: ``trainer.attribute(datamodule)``, or ``trainer.attribute(model, datamodule=...)``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from torch import Tensor

from lightning_attr.attribution.arguments import by_position
from lightning_attr.attribution.division import whole_module
from lightning_attr.attribution.predict_step import AttributionStep
from lightning_attr.attribution.request import AttributionRecord, AttributionRequest, resolve
from lightning_attr.attribution.reranking import check_reranking, joined, with_candidates, with_depth
from lightning_attr.attribution.run import predicted, processes_of
from lightning_attr.attribution.run_check import RunCheck
from lightning_attr.methods import AttributionMethod
from lightning_attr.objectives.target_function import TargetFunction
from lightning_attr.pilots import Pilots
from lightning_attr.results.result import AttributionResult
from lightning_attr.user_code.lightning_names import check_one_world


def attribute(
    trainer: L.Trainer,
    model_or_datamodule: L.LightningModule | L.LightningDataModule | None = None,
    *,
    model: L.LightningModule | None = None,
    datamodule: L.LightningDataModule | None = None,
    train_dataloaders: Any = None,
    target_dataloaders: Any = None,
    targets: str = "auto",
    ckpt_path: str | Path | Sequence[str | Path] | None = None,
    method: AttributionMethod | None = None,
    store: str | Path | None = None,
    noise_mask: Tensor | None = None,
    topk: int | None = None,
    memory_budget: int | None = None,
    target_function: TargetFunction | None = None,
    mode: str | None = None,
    pilots: int | Pilots | None = None,
    rerank: AttributionMethod | None = None,
    candidates: int | None = None,
) -> AttributionResult:
    """Score every training sample for every target, on the trainer's devices.

    Features that the store holds are used, missing ones are computed and kept. Row ``i`` of the scores is
    ``dataset[i]`` of the training data and column ``j`` is ``dataset[j]`` of the targets, whatever the loaders
    shuffle, drop or pad. Trainer and module are put back as they were.

    ``trainer.attribute(datamodule)`` after a fit, ``trainer.attribute(model, datamodule=datamodule, ckpt_path="best")``
    as ``trainer.predict`` has it, and ``trainer.attribute(datamodule, model=model)`` are all understood.

    Args:
        trainer: any ``Trainer`` of ``lightning`` or ``pytorch_lightning``.
        model_or_datamodule: the one of both that is passed by position, in place of its name.
        model: the module; by default the one of the fit before. Without :class:`lightning_attr.AttributionMixin`, what
            is attributed is the loss of its ``training_step``.
        datamodule: gives training data and targets; by default the one of the fit before.
        train_dataloaders: the training loader, instead of the datamodule's. Only its data set, collation, workers and
            batch size are used.
        target_dataloaders: the loader of the targets, likewise.
        targets: "predict", "test", "val" or "train"; "auto" takes the first of them whose loader can be made and whose
            batches have what training batches have, labels for instance, and says which it passed over.
        ckpt_path: checkpoints of the module to attribute at, each a snapshot, in place of those of a callback: "best",
            "last", the path of a file that a Trainer wrote, a URL that fsspec reads, or a list of these. Learning rates
            and moments come from the optimizer states in them. With ``store``, features are kept there.
        method: how to score; by default the callback's, else TRAK with the store's projection.
        store: directory of a store; by default the callback's. Without either, the model's current weights are the only
            snapshot, and nothing is kept, so that features are not rounded to half precision. A directory without a
            store gets one of the current weights.
        noise_mask: ``(n_train,)``, bool: samples known to be mislabelled, for the metrics; by default the callback's.
        topk: keep only this many proponents and opponents of each target, with the figures of all scores: the result's
            ``scores`` are :class:`lightning_attr.results.TopScores`, and no matrix of all scores is ever built.
        memory_budget: bytes that the tensors of a featurized batch may take: a larger batch goes through in parts. By
            default half of what is free on the device.
        target_function: ``(module, batch) -> (b,)``, differentiable: what is measured of each target, higher is more of
            it. By default the model output: a logit difference, the log-probability of another answer or a reward are
            as good. Training samples keep theirs, and with it their self-influence.
        mode: "eval", or "train" for modules whose loss needs ``self.training``: statistics of BatchNorm stay frozen,
            and where the module is random each sample has random numbers of its own. By default the store's, else eval
            mode, unless the loss or its gradient depends on the mode, or exists in train mode only: a log line says so.
        pilots: how many short runs from other weights score together with the recorded run; see
            :class:`lightning_attr.pilots.Pilots`. Those that the store misses are trained now, by the training loader
            at hand, and kept: each costs a sixth of the run or more, which is said before. By default the run alone
            scores.
        rerank: a second, dearer method, which scores the ``candidates`` of the first again: ``scores`` are
            :class:`lightning_attr.results.RerankedScores`, and their order is that of the second method. It is of the
            run alone, without pilots. :class:`lightning_attr.methods.Influence` and
            :class:`lightning_attr.methods.SOURCE` then solve for no other training samples.
        candidates: how many of the strongest proponents of each target, and of its opponents, ``rerank`` scores; by
            default 100.

    Returns:
        Scores, self-influence, data value and metrics.

    Raises:
        TypeError: if an argument is of another class than its own, model or datamodule came twice, the model can not
            be attributed, or model and trainer are of ``lightning`` and ``pytorch_lightning`` in turn.
        ValueError: if model or data are missing, or the noise mask or ``topk`` does not fit.
        AttributionError: if the strategy shards parameters in a form that cannot be gathered, the callback has recorded
            nothing, the store has no snapshots, or pilots cannot be trained as the run was.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> loader = DataLoader(TensorDataset(torch.eye(2), torch.tensor([0, 1])))
        >>> trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> attribute(trainer, model=Classifier(), train_dataloaders=loader, targets="train").self_influence.shape
        torch.Size([2])
    """
    with processes_of(trainer).together():  # what one of them finds here, the others would wait for ever
        count = check_reranking(rerank, candidates)
        model, datamodule = by_position(model_or_datamodule, model, datamodule)
    settled = partial(
        resolve,
        trainer,
        datamodule,
        model=model,
        train_dataloaders=train_dataloaders,
        target_dataloaders=target_dataloaders,
        targets=targets,
        store=store,
        ckpt_path=ckpt_path,
        noise_mask=noise_mask,
        memory_budget=memory_budget,
        target_function=target_function,
        mode=mode,
    )
    with whole_module(trainer, model):
        with processes_of(trainer).together():
            request = settled(method=method, topk=topk, pilots=pilots)
            if count is not None:
                settled(method=rerank, topk=None, pilots=None)  # what it is refused for is told before the first runs
                request = with_depth(request, count)
        result = _result(trainer, request)
        if count is None:
            return result
        with processes_of(trainer).together():
            second = with_candidates(settled(method=rerank, topk=None, pilots=None), result, count)
        return joined(result, _result(trainer, second))


def _result(trainer: L.Trainer, request: AttributionRequest) -> AttributionResult:
    with predicted(trainer, request, AttributionStep) as step:
        # A spawning strategy computed the result in other processes.
        return step.result if step.result is not None else AttributionResult.load(step.folder)


class AttributionTrainer(L.Trainer):
    """A ``lightning.Trainer`` with one more step, :meth:`attribute`.

    Example:
        >>> import lightning as L, torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> x, y = torch.eye(2).repeat(4, 1), torch.tensor([0, 1]).repeat(4)
        >>> loader = DataLoader(TensorDataset(x, y), batch_size=4)
        >>> trainer = AttributionTrainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> result = trainer.attribute(model=Classifier(), train_dataloaders=loader, target_dataloaders=loader)
        >>> result.scores.shape
        (8, 8)
    """

    if not TYPE_CHECKING:  # its signature is Lightning's own

        @wraps(L.Trainer.fit)
        def fit(self, model: Any, *args: Any, **kwargs: Any) -> None:
            """Train as ``lightning.Trainer`` does; for parts of ``pytorch_lightning`` say which Trainer they need."""
            check_one_world(self, model, *args, *kwargs.values())
            super().fit(model, *args, **kwargs)

    def check(self, model: Any, datamodule: Any = None, train_dataloaders: Any = None) -> RunCheck:
        """Say what the AttributionCallback of this trainer would do in a run, and what it would cost, without training.

        Args:
            model: the module, as it would be passed to ``fit``.
            datamodule: gives the training data.
            train_dataloaders: the training loader, in place of the datamodule's.

        Returns:
            As :meth:`lightning_attr.callbacks.AttributionCallback.check`.

        Raises:
            ValueError: if the trainer has no such callback.
        """
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]  # set by Lightning's connectors
        recorder = next(
            (one for one in callbacks if isinstance(one, AttributionRecord) and hasattr(one, "check")), None
        )
        if recorder is None:
            raise ValueError(
                "Expected an AttributionCallback among the Trainer's callbacks, because it says what it would do, but "
                "found none. Use AttributionTrainer(callbacks=[AttributionCallback()])."
            )
        found: RunCheck = recorder.check(model, datamodule, train_dataloaders=train_dataloaders, trainer=self)
        return found

    attribute = attribute  # with this trainer as its first argument
