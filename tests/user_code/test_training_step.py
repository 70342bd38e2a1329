"""A training step run beside training: its loss, and no trace of it."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics.aggregation import CatMetric
from torchmetrics.classification import MulticlassAccuracy

from cases import needs_subclasses_under_modes, quiet_trainer
from lightning_attr.user_code.training_step import check_training_step, has_training_step, training_loss

X = torch.tensor([1.0, 3.0])


class Step(L.LightningModule):
    """``act(module)`` is what the step does besides its loss."""

    def __init__(self, act: Callable[[Any], object] = lambda module: None) -> None:
        super().__init__()
        self.act = act
        self.slope = nn.Parameter(torch.tensor(2.0))
        self.inner = nn.BatchNorm1d(2)
        self.register_buffer("centre", torch.zeros(2))
        self.accuracy, self.seen = MulticlassAccuracy(2), CatMetric()
        self.count, self.total, self.name = 0, torch.zeros(2), "before"
        self.losses, self.recent, self.ids = [1.0], deque([1], maxlen=2), {1}  # type: ignore[var-annotated]
        self.nested = {"a": [[1.0], {"b": [2.0]}], "c": (torch.zeros(1), [3.0])}
        self.groups, self.ordered = defaultdict(list, x=[1]), OrderedDict(a=1, b=2)  # type: ignore[var-annotated]
        self.apart = [MulticlassAccuracy(2)]  # not a submodule
        self.save_hyperparameters({"rate": 0.1})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.act(self)
        return (self.slope * batch).square().mean()


def everything(value: Any) -> Any:
    """A deep copy to compare, with the identity of what is put back by reference."""
    if isinstance(value, nn.Module):
        own = {name: everything(v) for name, v in vars(value).items() if name not in {"_modules", "_trainer"}}
        return own, [everything(child) for child in value.children()]
    if isinstance(value, Tensor):
        return id(value), value.tolist()
    if isinstance(value, dict):
        return id(value), [(key, everything(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return id(value), [everything(item) for item in value]
    return (id(value), set(value)) if isinstance(value, set) else value


def _in_place(module: Any) -> None:
    module.total += 1
    module.centre.mul_(0).add_(5)
    module.nested["c"][0].fill_(7)


def _replace(module: Any) -> None:
    module.total, module.centre, module.name = torch.ones(3), torch.ones(2), "after"
    module.losses, module.inner.extra, module.inner.eps = [], 1, 0.5


def _grow(module: Any) -> None:
    module.losses.append(2.0)
    module.recent.append(2)
    module.recent.append(3)
    module.ids.add(2)
    module.nested["a"][1]["b"].append(9.0)
    module.nested["c"][1].clear()
    module.nested["new"] = []
    module.groups["y"].append(1)
    module.ordered.move_to_end("a")
    module.hparams.rate = 0.2


def _shrink(module: Any) -> None:
    del module.name, module.count, module.nested["a"]
    module.losses.clear()
    module.ids.discard(1)


def _metrics(module: Any) -> None:
    for metric in (module.accuracy, module.apart[0]):
        metric(torch.eye(2), torch.tensor([0, 0]))
    module.accuracy.update(torch.eye(2), torch.tensor([0, 0]))
    module.seen.update(torch.ones(2))


def _submodules(module: Any) -> None:
    module.inner.running_mean += 1
    module.inner.num_batches_tracked = torch.tensor(3)
    module.seen.own = []


def _count(module: Any) -> None:
    module.count += 1


ACTS = [_count, _in_place, _replace, _grow, _shrink, _metrics, _submodules]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_changed(act: Callable[[Any], object], fails: bool) -> None:
    def then(module: Any) -> None:
        act(module)
        assert everything(module) != before
        if fails:
            raise KeyError

    module = Step(then).eval()
    module.accuracy.update(torch.eye(2), torch.tensor([0, 0]))
    before = everything(module)
    if fails:
        with pytest.raises(KeyError):
            training_loss(module, X)
    else:
        assert training_loss(module, X).item() == 20
    assert everything(module) == before
    assert module.slope.grad is None


def test_every_run_starts_alike() -> None:
    class Annealed(Step):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.count += 1
            self.total += 1
            return self.count * self.total.sum() * super().training_step(batch, batch_idx)

    module = Annealed().eval()
    assert training_loss(module, X).item() == training_loss(module, X).item() == 40


def test_tensors_that_nobody_writes_to_are_not_written_to() -> None:
    module = Step().eval()
    versions = [tensor._version for tensor in (module.total, module.centre, module.inner.running_mean, module.slope)]
    training_loss(module, X).backward()
    assert versions == [t._version for t in (module.total, module.centre, module.inner.running_mean, module.slope)]
    assert module.slope.grad.item() == 20


def test_tensors_from_inference_mode() -> None:
    def act(module: Any) -> None:
        module.made.add_(1) if torch.is_inference_mode_enabled() else None
        module.seen_sum = module.made + 1

    module = Step(act)
    with torch.inference_mode():
        module.made = torch.zeros(2)
    assert training_loss(module, X).item() == 20
    with torch.inference_mode():
        training_loss(module, X)
    assert module.made.tolist() == [0, 0]
    assert not hasattr(module, "seen_sum")


class Talkative(Step):
    def __init__(self) -> None:
        super().__init__()
        self.part = Step()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        self.log_dict({"a": 1.0, "b": self.accuracy})
        self.part.log("inner", 1.0)
        self.print("some words")
        if self._trainer is not None:
            self.logger.log_metrics({"direct": 1.0}, step=0)
            self.logger.experiment.add_image("image", batch)
            for logger in self.trainer.loggers:
                logger.log_metrics({"direct": 2.0}, step=0)
            self.trainer.logger.log_hyperparams({"x": 1})
        return {"loss": loss, "extra": batch}


def test_logging_without_a_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    assert training_loss(Talkative(), X).item() == 20
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("logged", [True, False])
def test_logging_with_a_trainer(tmp_path: Any, logged: bool, capsys: pytest.CaptureFixture[str]) -> None:
    class Recording(CSVLogger):
        def __init__(self) -> None:
            super().__init__(tmp_path)
            self.heard: list[Any] = []

        def log_metrics(self, *arguments: Any, **settings: Any) -> None:
            self.heard.append(arguments)

        log_hyperparams = log_metrics  # type: ignore[assignment]

    logger = Recording()
    trainer = quiet_trainer(L.Trainer, logger=logger if logged else False)
    module = Talkative()
    module.trainer = trainer
    before, loggers = sorted(vars(module)), list(trainer.loggers)
    assert training_loss(module, X).item() == 20
    assert logger.heard == []
    assert trainer.loggers == loggers == ([logger] if logged else [])
    assert trainer.callback_metrics == {}
    assert sorted(vars(module)) == before
    assert module.log.__func__ is L.LightningModule.log  # type: ignore[attr-defined]
    assert capsys.readouterr().out == ""


def test_loggers_come_back_after_an_error(tmp_path: Any) -> None:
    def fail(module: Any) -> None:
        raise KeyError

    module, logger = Step(fail), CSVLogger(tmp_path)
    module.trainer = trainer = quiet_trainer(L.Trainer, logger=logger)
    with pytest.raises(KeyError):
        training_loss(module, X)
    assert trainer.loggers == [logger]


class Nothing(L.LightningModule):
    pass


def test_which_modules_have_a_training_step() -> None:
    assert has_training_step(Step())
    assert not has_training_step(Nothing())
    assert not has_training_step(nn.Linear(1, 1))
    check_training_step(Step())


class Labelled(Tensor):
    """What libraries make of tensors: a subclass that knows more of its batch."""


@needs_subclasses_under_modes
def test_the_loss_is_a_plain_tensor_whatever_the_batch_is_made_of() -> None:
    class Line(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(2.0))

        def training_step(self, batch: Tensor) -> Tensor:
            return (self.slope * batch).mean()

    module, batch = Line(), torch.tensor([1.0, 3.0]).as_subclass(Labelled)
    assert type(module.training_step(batch)) is Labelled
    loss = training_loss(module, batch)
    assert type(loss) is Tensor
    assert torch.autograd.grad(loss, module.slope)[0] == 2
