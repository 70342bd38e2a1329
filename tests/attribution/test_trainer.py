"""`trainer.attribute`: its three forms, what it refuses, and that trainer and module are put back as they were."""

from __future__ import annotations

import copy
import io
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from cases import BlobClassifier, Tally, blobs, loader_of, quiet_trainer
from lightning_attr import FeatureStore, attribute
from lightning_attr.attribution.arguments import check_noise_mask
from lightning_attr.attribution.strategies import check_strategy
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import (
    AttributionError,
    BatchDependenceError,
    NonFiniteGradientError,
    SampleReadError,
    StoreMismatchError,
)
from lightning_attr.methods import TRAK, GradDot
from lightning_attr.projectors import IdentityProjector

# The shared module has a validation step; not every test validates.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

METHOD = TRAK(proj_dim=16)
TRAIN, TARGETS = blobs(20), blobs(6, seed=1)


def fitted(kind: type[L.Trainer] | None = None, path: str = "run", module: Any = None, **settings: Any) -> Any:
    """A trainer after three epochs on 20 samples, with the callback."""
    callbacks = [AttributionCallback(path, method=METHOD, log=False), *settings.pop("callbacks", [])]
    given = {"max_epochs": 3, "callbacks": callbacks, "num_sanity_val_steps": 0, **settings}
    trainer = quiet_trainer(**given) if kind is None else quiet_trainer(kind, **given)
    torch.manual_seed(1)
    trainer.fit(module or BlobClassifier(), loader_of(TRAIN, shuffle=True), loader_of(TARGETS))
    return trainer


def attributed(trainer: Any, **settings: Any) -> Any:
    return attribute(trainer, **{"target_dataloaders": loader_of(TARGETS), **settings})


def scores(trainer: Any = None, **settings: Any) -> Tensor:
    """Scores of the current weights of a module, or of a trainer's run."""
    given = (
        {"model": BlobClassifier(), "train_dataloaders": loader_of(TRAIN), "method": METHOD} if trainer is None else {}
    )
    return attributed(trainer or quiet_trainer(), **{**given, **settings}).scores.values


# Three forms, one result --------------------------------------------------------------------------------------------


def test_method_function_and_bound_method_agree() -> None:
    own, stock = fitted(), fitted(L.Trainer, path="stock")
    loader = loader_of(TARGETS)
    results = [
        own.attribute(target_dataloaders=loader),
        attribute(own, target_dataloaders=loader),
        stock.attribute(target_dataloaders=loader),
        attribute(stock, target_dataloaders=loader),
    ]
    for result in results[1:]:
        assert torch.equal(result.scores.values, results[0].scores.values)
        assert torch.equal(result.self_influence, results[0].self_influence)
        assert result.metrics == results[0].metrics
    assert results[0].scores.shape == (20, 6)
    assert results[0].scores.provenance["snapshots"] == [s.key for s in FeatureStore.open("run").snapshots]


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader_of(TRAIN)

    def test_dataloader(self) -> DataLoader:
        return loader_of(TARGETS)


def test_what_comes_by_position_is_the_model_or_the_datamodule() -> None:
    trainer, model = quiet_trainer(), BlobClassifier()
    expected = trainer.attribute(model=model, datamodule=Data(), method=METHOD).scores.values
    for given in ((model, {"datamodule": Data()}), (Data(), {"model": model})):
        assert torch.equal(trainer.attribute(given[0], **given[1], method=METHOD).scores.values, expected)
    assert torch.equal(attribute(trainer, model, datamodule=Data(), method=METHOD).scores.values, expected)


@pytest.mark.parametrize(
    ("first", "named", "message"),
    [
        (
            BlobClassifier(),
            {"model": BlobClassifier()},
            "`model` of attribute once, but got BlobClassifier by position",
        ),
        (Data(), {"datamodule": Data()}, "`datamodule` of attribute once, but got Data by position and Data by name"),
        (BlobClassifier, {}, "`model` of attribute to be a LightningModule, but got the class BlobClassifier"),
        (Data, {}, r"`datamodule` of attribute to be .*Pass an object of it, such as `Data\(\)`"),
        (loader_of(TRAIN), {}, "`datamodule` of attribute to be .*Pass loaders by name instead"),
        (nn.Linear(4, 3), {}, "LightningModule"),
    ],
)
def test_what_comes_by_position_is_refused_by_name(first: Any, named: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        quiet_trainer().attribute(first, **named)


def test_stock_trainer_without_callback_has_the_function_only() -> None:
    assert not hasattr(L.Trainer(barebones=True), "attribute")
    expected = scores()
    model, train = BlobClassifier(), loader_of(TRAIN)
    result = attributed(quiet_trainer(L.Trainer), model=model, train_dataloaders=train, method=METHOD)
    assert torch.equal(result.scores.values, expected)


# Stores -------------------------------------------------------------------------------------------------------------


def test_without_callback_and_store_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    result = attributed(quiet_trainer(), model=BlobClassifier(), train_dataloaders=loader_of(TRAIN))
    assert result.scores.provenance["snapshots"] == ["current"]
    assert list(tmp_path.rglob("*")) == [temporary]


def test_store_names_a_new_directory_that_is_kept_and_used() -> None:
    expected = scores(store="kept")
    assert [s.key for s in FeatureStore.open("kept").snapshots] == ["current"]
    torch.testing.assert_close(expected, scores(), rtol=0, atol=2e-3 * float(expected.abs().max()))  # not rounded
    other = BlobClassifier(seed=5)  # its weights do not matter: the store has a snapshot
    assert torch.equal(scores(store="kept", model=other), expected)
    assert not torch.equal(scores(model=other), expected)


@pytest.mark.parametrize("topk", [None, 3])
def test_without_a_store_features_in_memory_and_on_disk_give_the_same(
    topk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": BlobClassifier(), "train_dataloaders": loader_of(TRAIN), "method": METHOD, "topk": topk}
    kept = attributed(quiet_trainer(), **settings)
    written: list[str] = []
    write_shard = FeatureStore.write_shard
    monkeypatch.setattr(FeatureStore, "write_shard", lambda *given: written.append(given[1]) or write_shard(*given))
    again = attributed(quiet_trainer(), **settings)
    assert not written
    monkeypatch.setattr("lightning_attr.attribution.featurized_rows.free_bytes", lambda device: 1000)
    spilled = attributed(quiet_trainer(), **settings)
    assert written
    for other in (again, spilled):
        assert torch.equal(other.self_influence, kept.self_influence)
        assert torch.equal(other.loss, kept.loss)
        if topk is None:
            assert torch.equal(other.scores.values, kept.scores.values)
        else:
            assert all(
                torch.equal(one, two) for one, two in zip(other.scores.topk(3), kept.scores.topk(3), strict=True)
            )


def test_method_takes_the_projection_of_the_store() -> None:
    expected = scores(store="kept")
    assert TRAK().damping == METHOD.damping  # the projection is all that differs
    assert torch.equal(scores(store="kept", method=None), expected)
    assert FeatureStore.open("kept").fingerprint.projector == METHOD.projector.config


def test_other_method_with_the_same_projection() -> None:
    trainer = fitted()
    damped = TRAK(projector=METHOD.projector, damping=0.01)
    first, second = scores(trainer), scores(trainer, method=damped)
    assert not torch.allclose(first, second)
    result = attributed(trainer, method=GradDot(METHOD.projector))
    store = FeatureStore.open("run")
    last = store.snapshots[-1].key
    assert result.scores.provenance["method"] == "GradDot"
    assert result.scores.provenance["snapshots"] == [last]
    reference = store.column(last, "out_to_loss") * store.column(last, "features").square().sum(1)
    torch.testing.assert_close(result.self_influence, reference)


@pytest.mark.parametrize("method", [TRAK(proj_dim=32), GradDot(IdentityProjector()), TRAK(proj_dim=16, seed=1)])
def test_other_projection_is_refused(method: Any) -> None:
    trainer = fitted()
    before = Path("run/manifest.json").read_bytes()
    with pytest.raises(StoreMismatchError, match="projection"):
        attributed(trainer, method=method)
    assert Path("run/manifest.json").read_bytes() == before


def test_callback_that_has_recorded_nothing_is_refused(tmp_path: Path) -> None:
    loader = loader_of(blobs(8))
    for callback in (AttributionCallback(), AttributionCallback(tmp_path / "store")):
        with pytest.raises(AttributionError, match="The AttributionCallback of this trainer has recorded nothing yet"):
            quiet_trainer(callbacks=[callback]).attribute(
                model=BlobClassifier(), train_dataloaders=loader, targets="train"
            )
    assert not (tmp_path / "store").exists()


def test_after_a_development_run_the_current_weights_are_attributed(tmp_path: Path) -> None:
    loader = loader_of(blobs(8))
    trainer = quiet_trainer(callbacks=[AttributionCallback(tmp_path / "store")], fast_dev_run=True)
    trainer.fit(BlobClassifier(), loader)
    result = trainer.attribute(targets="train")
    assert result.scores.shape == (8, 8)
    assert result.scores.provenance["snapshots"] == ["current"]


def test_store_without_snapshots_is_refused() -> None:
    trainer = fitted()
    FeatureStore.create("empty", FeatureStore.open("run").fingerprint)
    with pytest.raises(AttributionError, match=r"empty has no snapshots to attribute at. Fit with AttributionCallback"):
        attributed(trainer, store="empty")


def test_model_of_another_layout_is_refused() -> None:
    trainer = fitted()
    wide = BlobClassifier()
    wide.network[0] = nn.Linear(4, 9)
    with pytest.raises(StoreMismatchError, match=r"another model.*network\.0\.weight"):
        attributed(trainer, model=wide)


def test_training_data_of_another_length_are_refused() -> None:
    fitted()
    with pytest.raises(StoreMismatchError, match="20 samples, but this one has 19"):
        scores(store="run", train_dataloaders=loader_of(blobs(19)))


# What is refused ----------------------------------------------------------------------------------------------------


class Pairs(IterableDataset):
    def __iter__(self) -> Any:
        return iter(torch.rand(20, 4))


class WithBatchNorm(BlobClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.network.insert(1, nn.BatchNorm1d(8, track_running_stats=False))


class MixesSamples(BlobClassifier):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Foreign(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)


def spoiled(row: int) -> TensorDataset:
    x, y = (tensor.clone() for tensor in TRAIN.tensors)
    x[row] = float("nan")
    return TensorDataset(x, y)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"train_dataloaders": DataLoader(Pairs())},
            TypeError,
            "two passes over Pairs, an IterableDataset, differ: its samples have no index",
        ),
        (
            {"target_dataloaders": DataLoader(Pairs())},
            TypeError,
            "Expected the target data set to give the same samples",
        ),
        ({"train_dataloaders": DataLoader(TensorDataset(torch.zeros(0)))}, ValueError, "TensorDataset is empty"),
        ({"model": Foreign()}, TypeError, "Expected Foreign to have lightning_attr.AttributionMixin among its bases"),
        (
            {"model": BlobClassifier().requires_grad_(False)},
            ValueError,
            "at least one parameter with requires_grad=True",
        ),
        ({"model": WithBatchNorm()}, AttributionError, "running statistics|running_mean|track_running_stats"),
        ({"model": MixesSamples()}, BatchDependenceError, "depends on the samples beside it"),
        (
            {"train_dataloaders": loader_of(spoiled(13))},
            NonFiniteGradientError,
            r"is NaN or Inf .*dataset\[13\]",
        ),
        ({"train_dataloaders": loader_of(spoiled(1))}, NonFiniteGradientError, "NaN or Inf"),
        ({"target_dataloaders": loader_of(spoiled(13))}, NonFiniteGradientError, "sample 13 is NaN or Inf"),
    ],
)
def test_bad_input(settings: Any, error: type[Exception], message: str) -> None:
    trainer = quiet_trainer()
    with pytest.raises(error, match=message):
        scores(
            trainer, **{"model": BlobClassifier(), "train_dataloaders": loader_of(TRAIN), "method": METHOD, **settings}
        )
    assert trainer.lightning_module is None
    assert list(Path().iterdir()) == []
    assert torch.equal(  # and it works afterwards
        scores(trainer, model=BlobClassifier(), train_dataloaders=loader_of(TRAIN), method=METHOD), scores()
    )


def test_no_model() -> None:
    with pytest.raises(ValueError, match="Expected a model to attribute, but this trainer has none"):
        attributed(quiet_trainer(), train_dataloaders=loader_of(TRAIN))


@pytest.mark.filterwarnings("ignore:.*FSDP.*", "ignore:.*fully_shard.*")
def test_strategies_that_shard_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = quiet_trainer()
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", FSDPStrategy())
    with pytest.raises(
        AttributionError, match=r"whole parameters on each rank.*but FSDPStrategy shards them.*ModelParallelStrategy"
    ):
        scores(trainer, model=BlobClassifier(), train_dataloaders=loader_of(TRAIN))
    with pytest.raises(AttributionError, match="FSDPStrategy"):
        check_strategy(trainer.strategy)
    assert list(Path().iterdir()) == []


# Noise mask ---------------------------------------------------------------------------------------------------------

MASK = torch.arange(20) % 5 == 0
NOISE_METRICS = {
    f"{prefix}{name}"
    for prefix in ("", "loss_")
    for name in ("noisy_label_auroc", "noisy_label_recall@10%", "selection_noise_share@10%")
}


def test_noise_metrics_appear_with_a_mask_and_only_then() -> None:
    trainer = fitted()
    without, given = attributed(trainer), attributed(trainer, noise_mask=MASK)
    assert given.metrics.keys() >= NOISE_METRICS
    assert not NOISE_METRICS & without.metrics.keys()
    assert without.metrics.keys() == given.metrics.keys() - NOISE_METRICS
    assert without.noise_mask is None
    order = given.self_influence.argsort().argsort()
    pairs = [(order[i] > order[j]).item() for i in MASK.nonzero() for j in (~MASK).nonzero()]
    assert given.metrics["noisy_label_auroc"] == pytest.approx(sum(pairs) / len(pairs))


def test_mask_of_the_callback_is_the_default() -> None:
    trainer = fitted()
    trainer.callbacks[0].noise_mask = MASK
    assert attributed(trainer).metrics == attributed(trainer, noise_mask=MASK).metrics
    assert torch.equal(attributed(trainer, noise_mask=~MASK).noise_mask, ~MASK)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(19), r"one entry a training sample, of shape \(20,\), but got \(19,\)"),
        (torch.zeros(20, 1), r"of shape \(20,\), but got \(20, 1\)"),
        (torch.arange(20), "only True and False"),
        ([float("nan")] * 20, "only True and False"),
    ],
)
def test_bad_mask(mask: Any, message: str) -> None:
    trainer = fitted()
    with pytest.raises(ValueError, match=message):
        attributed(trainer, noise_mask=mask)
    with pytest.raises(ValueError, match=message):
        check_noise_mask(mask, 20, "attribute")


def test_mask_may_be_a_list_of_zeros_and_ones() -> None:
    assert torch.equal(attributed(fitted(), noise_mask=MASK.int().tolist()).noise_mask, MASK)


# Put back -----------------------------------------------------------------------------------------------------------


class Watchful(L.Callback):
    """Notes every hook that is called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("on_", "setup", "teardown")):
            object.__getattribute__(self, "calls").append(name)
        return super().__getattribute__(name)


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.written = 0

    def write_on_batch_end(self, *args: Any) -> None:
        self.written += 1

    def write_on_epoch_end(self, *args: Any) -> None:
        self.written += 1


class Stateful(BlobClassifier):
    """Has a buffer, a frozen parameter, modules in both modes, a child with a trainer of its own, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.child = L.LightningModule()
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.drop(self.norm(x))) * self.frozen


def state(trainer: Any, module: Any, data: Any) -> dict[str, Any]:
    """Everything that attribution might leave changed."""
    loops = [trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop]
    submodules = list(module.modules())
    return {
        "lightning_module": trainer.lightning_module,
        "model": trainer.model,
        "trainers": [m._trainer for m in submodules if isinstance(m, L.LightningModule)],
        "callbacks": list(trainer.callbacks),
        "loggers": list(trainer.loggers),
        "datamodule": trainer.datamodule,
        "state": vars(copy.copy(trainer.state)),
        "loops": [trainer.predict_loop, trainer.predict_loop.inference_mode, trainer.predict_loop.predictions],
        "limit": trainer.limit_predict_batches,
        "loaders": [trainer.train_dataloader, trainer.val_dataloaders, *(loop._data_source.instance for loop in loops)],
        "metrics": [dict(trainer.callback_metrics), dict(trainer.logged_metrics), dict(trainer.progress_bar_metrics)],
        "progress": [trainer.current_epoch, trainer.global_step, trainer.should_stop, trainer.ckpt_path],
        "modes": [m.training for m in submodules],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in submodules],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "parameters": [id(p) for p in module.parameters()],
        "buffers": [id(b) for b in module.buffers()],
        "values": [t.clone() for t in (*module.parameters(), *module.buffers())],
        "grads": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "rng": [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()],  # noqa: NPY002
        "own rng": data.generator.get_state(),
        "modes of torch": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()],
        "files": sorted(Path().rglob("*")),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in before:
        left, right = (item if isinstance(item, (list, dict)) else [item] for item in (before[name], after[name]))
        left, right = (list(item.items()) if isinstance(item, dict) else item for item in (left, right))
        assert len(left) == len(right), name
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name


class Noisy(Dataset[Any]):
    """Adds noise from every stream there is; `spoiled` samples raise."""

    def __init__(self, spoiled: int | None = None) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.spoiled = spoiled

    def __len__(self) -> int:
        return len(TRAIN)

    def __getitem__(self, row: int) -> Any:
        if row == self.spoiled:
            raise OSError("no such image")
        x, y = TRAIN[row]
        noise = random.random() + np.random.rand() + torch.rand(1) + torch.rand(1, generator=self.generator)  # noqa: NPY002
        return x + noise, y


@pytest.fixture
def own_interrupts() -> Iterator[None]:
    """Lightning ignores further interrupts after the first."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("outcome", ["result", "error in the data", "error in the module", "interrupt"])
@pytest.mark.parametrize("reference", ["fresh", "fitted"])
@pytest.mark.usefixtures("own_interrupts")
def test_everything_is_put_back(reference: str, outcome: str) -> None:
    model, data, writer, watch = Stateful(), Noisy(), Writer(), Watchful()
    checkpoint = ModelCheckpoint("checkpoints")
    settings = {"callbacks": [writer, watch, checkpoint], "enable_checkpointing": True, "logger": True, "max_epochs": 1}
    trainer = quiet_trainer(**settings, num_sanity_val_steps=0, log_every_n_steps=1)
    if reference == "fitted":
        trainer.fit(model, loader_of(data, shuffle=True), loader_of(TARGETS))
    for p in model.network.parameters():
        p.grad = torch.ones_like(p)
    model.drop.eval()
    model.norm.train()
    before, calls, best = state(trainer, model, data), list(watch.calls), checkpoint.best_model_path

    given = {"model": model, "train_dataloaders": loader_of(data), "target_dataloaders": loader_of(TARGETS)}
    if outcome == "result":
        assert attribute(trainer, **given).scores.shape == (20, 6)
    elif outcome == "error in the data":
        data.spoiled = 11
        with pytest.raises(SampleReadError, match=r"dataset\[11\] of Noisy could not be read: OSError: no such image"):
            attribute(trainer, **given)
    else:
        error = RuntimeError("torn") if outcome == "error in the module" else KeyboardInterrupt()
        model.attribution_step = raising(model, error, after=8)
        with pytest.raises((RuntimeError, SystemExit)):  # Lightning exits when interrupted
            attribute(trainer, **given)
        del model.attribution_step
    assert_same(before, state(trainer, model, data))
    assert watch.calls == calls
    assert writer.written == 0
    assert checkpoint.best_model_path == best


def raising(module: Any, error: BaseException, after: int) -> Any:
    """The module's attribution step, which works a few times, counted in a file: what variables hold is put back."""
    step, calls = module.attribution_step, Tally()

    def attribution_step(batch: Any) -> Any:
        if len([*calls]) == after:
            raise error
        calls.append(None)
        return step(batch)

    return attribution_step


def outcomes(trainer: Any, model: Any) -> list[Any]:
    """What validate, test, predict and a fit by another trainer give."""
    loader = loader_of(TARGETS)
    losses = [getattr(trainer, kind)(model, loader, verbose=False)[0] for kind in ("validate", "test")]
    predictions = trainer.predict(model, loader)
    further = quiet_trainer(L.Trainer, max_epochs=2)
    torch.manual_seed(3)
    further.fit(model, loader_of(TRAIN, shuffle=True))
    return [*losses, *predictions, *(p.detach().clone() for p in model.parameters())]


def test_trainer_and_module_work_on_as_before() -> None:
    plain, used = fitted(path="plain"), fitted(path="used")
    attributed(used)
    expected, found = (outcomes(t, t.lightning_module) for t in (plain, used))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    attributed(used)
    assert used.fit_loop.max_epochs == 3
    used.fit_loop.max_epochs = 5
    used.fit(used.lightning_module, loader_of(TRAIN, shuffle=True))
    assert used.current_epoch == 5
    assert FeatureStore.open("used").snapshots[-1].epoch == 4


def test_model_argument_keeps_its_weights_and_is_attributed_at_the_snapshots() -> None:
    trainer = fitted()
    expected = scores(trainer)
    other = BlobClassifier(seed=9)
    before = [p.detach().clone() for p in other.parameters()]
    assert torch.equal(scores(trainer, model=other), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    assert other._trainer is None
    assert trainer.lightning_module is not other


def test_user_callbacks_see_nothing_of_it() -> None:
    writer = Writer()
    trainer = fitted(callbacks=[writer])
    attributed(trainer)
    assert writer.written == 0
    trainer.predict(trainer.lightning_module, loader_of(TARGETS))
    assert writer.written == 2


@pytest.mark.parametrize(
    "settings",
    [{"fast_dev_run": True}, {"limit_predict_batches": 1}, {"limit_predict_batches": 0}, {"inference_mode": False},
     {"barebones": True, "enable_checkpointing": None, "logger": None, "enable_progress_bar": None,
      "enable_model_summary": None}],
)  # fmt: skip
def test_settings_of_the_trainer_do_not_truncate_or_change_it(settings: Any) -> None:
    trainer = quiet_trainer(**settings)
    limit = trainer.limit_predict_batches
    found = scores(trainer, model=BlobClassifier(), train_dataloaders=loader_of(TRAIN), method=METHOD)
    assert torch.equal(found, scores())
    assert trainer.limit_predict_batches == limit


def test_no_logs_are_written() -> None:
    trainer = quiet_trainer(logger=True)
    scores(trainer, model=BlobClassifier(), train_dataloaders=loader_of(TRAIN))
    assert list(Path().iterdir()) == []
    assert trainer.logger is not None


# Precision and progress ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-3), ("bf16-mixed", 0.1)])
def test_precision(precision: Any, tolerance: float) -> None:
    trainer, model = quiet_trainer(precision=precision), BlobClassifier()
    expected = scores()
    found = scores(trainer, model=model, train_dataloaders=loader_of(TRAIN), method=METHOD)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() < tolerance * expected.norm()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), BlobClassifier().parameters(), strict=True))


class MakesTensors(BlobClassifier):
    """Its forward makes a tensor of the default dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) + nn.functional.linear(x, torch.zeros(3, 4, device=x.device))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_true_precision_sets_the_default_dtype_for_the_check_as_well(precision: Any) -> None:
    trainer = quiet_trainer(precision=precision)
    assert scores(trainer, model=MakesTensors(), train_dataloaders=loader_of(TRAIN), method=METHOD).isfinite().all()


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_precision_with_the_callback(precision: Any) -> None:
    trainer = fitted(precision=precision)
    first = scores(trainer)
    store = FeatureStore.open("run")
    for snapshot in store.snapshots:
        (Path("run") / snapshot.folder / "features" / "00000.safetensors").unlink()
    store.repair()
    assert torch.equal(scores(trainer), first)


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_progress_bar_counts_every_batch(bar: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    if bar == "rich":
        monkeypatch.setenv("FORCE_COLOR", "1")
    callbacks = [RichProgressBar() if bar == "rich" else TQDMProgressBar()]
    with redirect_stdout(stream):
        trainer = quiet_trainer(enable_progress_bar=True, callbacks=callbacks)
        scores(trainer, model=BlobClassifier(), train_dataloaders=loader_of(TRAIN), method=METHOD)
    assert "Predicting" in stream.getvalue()
    assert "4/4" in stream.getvalue()  # 20 and 6 samples in batches of 8
    assert sys.stdout is not stream
