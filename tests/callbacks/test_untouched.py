"""Training with the callback is training without it, to the last bit."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.features.featurizer import Featurizer
from lightning_attr.methods import TRAK

pytestmark = [
    # Said of the case with a frozen trunk in eval mode, which is the point of it.
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode at the start of training"),
    # Only early stopping needs validation data here.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


class Net(BlobClassifier):
    """What has state besides weights: BatchNorm's buffers, Dropout's draws, an optimizer's moments, a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(
                nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"},
        }


class FrozenTrunk(Net):
    """A trunk that does not train and stays in eval mode, whatever mode the rest is put into."""

    def __init__(self) -> None:
        super().__init__()
        self.network[:2].requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenTrunk:
        super().train(mode)
        self.network[:2].eval()
        return self


class TwoOptimizers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(part.parameters(), lr=0.05, momentum=0.9) for part in (self.network[:2], self.network[2:])
        ]


class Noisy(Dataset[Any]):
    """A random augmentation that draws from all global streams."""

    def __init__(self) -> None:
        self.data = blobs(26)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[i]
        return x + 0.1 * self.noise(), y

    def noise(self) -> Tensor:
        return torch.randn(4) * random.random() + np.random.rand()  # noqa: NPY002 - what augmentations draw from


class OwnGenerators(Noisy):
    """The same from generators that the data set keeps, two of them in a list of transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.python, self.torch = random.Random(1), torch.Generator().manual_seed(1)
        self.transforms = [np.random.default_rng(1), np.random.RandomState(1)]

    def noise(self) -> Tensor:
        shift = sum(float(generator.normal()) for generator in self.transforms)
        return torch.randn(4, generator=self.torch) * self.python.random() + shift


class NoisyCollate:
    """A collation with a generator of its own, as for mixing samples."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(2)

    def __call__(self, samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return x + torch.randn(x.shape, generator=self.generator), y


def early_stopping() -> dict[str, Any]:
    return {"callbacks": [EarlyStopping("val_loss", patience=0, min_delta=10.0)], "max_epochs": 10}


class Stepping(L.LightningModule):
    """No mixin: its own step is what is attributed, and it logs means over the epoch."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True, on_step=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def small_batches() -> dict[str, Any]:
    """Batches of which an epoch has many."""
    return {"batch_size": 2}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "augmentation": {"dataset": Noisy},
    "generators": {"dataset": OwnGenerators},
    "collation": {"loader": lambda: {"collate_fn": NoisyCollate()}},
    "loader generator": {"loader": lambda: {"generator": torch.Generator().manual_seed(3)}},
    "accumulation": {"trainer": lambda: {"accumulate_grad_batches": 3}},
    "bf16": {"trainer": lambda: {"precision": "bf16-mixed"}},
    "frozen trunk": {"module": FrozenTrunk},
    "early stopping": {"trainer": early_stopping},
    "two optimizers": {"module": TwoOptimizers},
    "clipping": {"trainer": lambda: {"gradient_clip_val": 0.1}},
    "snapshots only": {"callback": {"featurize": False}},
    "optimizer state": {"callback": {"optimizer_state": True}},
    "workers": {"dataset": Noisy, "loader": lambda: {"num_workers": 2}},
    "early": {"callback": {"snapshots": "early+geometric"}, "loader": small_batches},
    "early, plain module": {"module": Stepping, "callback": {"snapshots": "early+geometric"}, "loader": small_batches},
    "early, accumulation": {
        "callback": {"snapshots": "early+geometric"},
        "loader": small_batches,
        "trainer": lambda: {"accumulate_grad_batches": 2},
    },
    "early, workers": {
        "dataset": OwnGenerators,
        "callback": {"snapshots": "early+geometric"},
        "loader": lambda: {"batch_size": 2, "num_workers": 2},
    },
    "own workers": {"dataset": OwnGenerators, "loader": lambda: {"num_workers": 2, "persistent_workers": True}},
}


def fit(tmp_path: Any, with_callback: bool, case: dict[str, Any], *extra: L.Callback) -> tuple[L.Trainer, Net]:
    """One training from fixed seeds; the callback comes first, as the one whose effect is asked for."""
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    module = case.get("module", Net)()
    settings = {"max_epochs": 3, **case.get("trainer", dict)()}
    own = [
        AttributionCallback(
            *(tmp_path / "store", TRAK(8)), **{"snapshots": "all", "batch_size": 4, **case.get("callback", {})}
        )
    ]
    callbacks = (own if with_callback else []) + list(settings.pop("callbacks", [])) + list(extra)
    trainer = quiet_trainer(L.Trainer, callbacks=callbacks, **settings)
    data = case.get("dataset", lambda: blobs(26))()
    loader = loader_of(data, **{"batch_size": 6, "shuffle": True, **case.get("loader", dict)()})
    val = loader_of(blobs(9, seed=1)) if any(isinstance(c, EarlyStopping) for c in callbacks) else None
    trainer.fit(module, loader, val)
    return trainer, module


def streams() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}  # noqa: NPY002


def outcome(trainer: L.Trainer, module: Net) -> dict[str, Any]:
    """All that a training leaves behind."""
    return {
        "streams": streams(),
        "weights": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "gradients": {name: p.grad for name, p in module.named_parameters()},
        "flags": {name: p.requires_grad for name, p in module.named_parameters()},
        "modes": {name: part.training for name, part in module.named_modules()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "progress": (trainer.global_step, trainer.current_epoch),
        "metrics": dict(trainer.callback_metrics),
        "data": [generator.get_state() for generator in _generators(trainer)],
    }


def _generators(trainer: L.Trainer) -> list[Any]:
    loader = trainer.train_dataloader
    found = [getattr(loader.dataset, "torch", None), getattr(loader.collate_fn, "generator", None), loader.generator]
    return [generator for generator in found if generator is not None]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit, NaN included."""
    assert type(a) is type(b), where
    if isinstance(a, (Tensor, np.ndarray)):
        np.testing.assert_array_equal(torch.as_tensor(a).numpy(), torch.as_tensor(b).numpy(), err_msg=where)
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("name", CASES)
def test_training_is_untouched(tmp_path: Any, name: str) -> None:
    case = CASES[name]
    without = outcome(*fit(tmp_path, False, case))
    beside = outcome(*fit(tmp_path, True, case))
    assert_same(without, beside)
    assert (tmp_path / "store" / "manifest.json").exists()


def test_a_different_training_is_told_apart(tmp_path: Any) -> None:
    """The comparison above can fail: one more draw from one stream is enough."""

    class Draw(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            torch.rand(1)

    without, beside = (outcome(*fit(tmp_path, False, {}, *extra)) for extra in ((), (Draw(),)))
    with pytest.raises(AssertionError, match="weights"):
        assert_same(without["weights"], beside["weights"], "weights")


def test_checkpoints_are_the_same(tmp_path: Any) -> None:
    saved = []
    for with_callback in (False, True):
        folder = tmp_path / str(with_callback)
        keeper = ModelCheckpoint(folder, filename="last")
        fit(tmp_path, with_callback, {"trainer": lambda: {"enable_checkpointing": True}}, keeper)
        saved.append(torch.load(folder / "last.ckpt", weights_only=False))
    without, beside = saved
    own = [key for key in beside.pop("callbacks") if "AttributionCallback" in key]
    without.pop("callbacks")
    assert len(own) == 1
    assert_same(without, beside)


class Inspector(L.Callback):
    """Looks at what objects there are; one stands before the callback and one behind it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(inspect(trainer, pl_module))


def inspect(trainer: L.Trainer, module: L.LightningModule) -> Any:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "streams": streams(),
        "parameters": {name: (id(p), p._version, p.requires_grad) for name, p in module.named_parameters()},
        "gradients": {
            name: (id(p.grad), None if p.grad is None else p.grad.clone()) for name, p in module.named_parameters()
        },
        "buffers": {name: (id(b), b.clone()) for name, b in module.named_buffers()},
        "modes": {name: part.training for name, part in module.named_modules()},
        "hooks": {name: [len(getattr(part, kind)) for kind in hooks] for name, part in module.named_modules()},
        "stage": (trainer.state.fn, trainer.state.stage),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "metrics": [dict(m) for m in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)],
    }


@pytest.mark.parametrize("module", [Net, FrozenTrunk, TwoOptimizers])
def test_objects_are_the_same_before_and_after(tmp_path: Any, module: type[Net]) -> None:
    before, after = Inspector(), Inspector()
    callback = AttributionCallback(tmp_path / "store", TRAK(8), "all", batch_size=4)
    trainer = quiet_trainer(L.Trainer, max_epochs=2, callbacks=[before, callback, after])
    trainer.fit(module(), loader_of(Noisy(), batch_size=6, shuffle=True))
    assert len(before.seen) == len(callback.store.snapshots) == 2
    assert_same(before.seen, after.seen)


@pytest.mark.parametrize("module", [Net, FrozenTrunk])
def test_everything_is_restored_when_featurizing_raises(tmp_path: Any, monkeypatch: Any, module: type[Net]) -> None:
    class Last(Inspector):
        def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
            self.seen.append(inspect(trainer, pl_module))

    original = Featurizer.__call__

    def broken(self: Featurizer, batch: Any, rows: Any, out: Any = None) -> Any:
        torch.rand(1)
        random.random()
        if rows[0] >= 4:
            raise ZeroDivisionError("broken on purpose")
        return original(self, batch, rows)

    monkeypatch.setattr(Featurizer, "__call__", broken)
    before = Last()
    callback = AttributionCallback(tmp_path, TRAK(8), batch_size=4, on_error="raise")
    trainer = quiet_trainer(L.Trainer, max_epochs=2, callbacks=[before, callback])
    with pytest.raises(ZeroDivisionError, match="broken on purpose"):
        trainer.fit(module(), loader_of(Noisy(), batch_size=6, shuffle=True))
    expected, found = before.seen
    assert_same(expected, found)
