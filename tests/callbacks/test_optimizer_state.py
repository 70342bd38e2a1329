"""The optimizer's state beside the weights: what is kept, what is compared, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError
from lightning_attr.files.io import read_tensors
from lightning_attr.methods import LESS, TRAK, TracIn
from lightning_attr.parameters.weights import load_weights
from lightning_attr.projectors import IdentityProjector

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    # Lightning's own, told to pytest a second time, under our name, by `pytest.warns`.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


class Net(BlobClassifier):
    """One group for each layer."""

    kind: Any = torch.optim.AdamW

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.network[0].parameters(), "lr": 0.02},
            {"params": self.network[2].parameters(), "lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6},
        ]
        return self.kind(groups)


class Witness(L.Callback):
    """Keeps copies of what the optimizers held when each epoch ended."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = {name: trainer.optimizers[0].state[p] for name, p in pl_module.named_parameters()}
        self.seen.append({n: {key: torch.as_tensor(v).clone() for key, v in own.items()} for n, own in names.items()})


def fit(folder: Path, module: Any = None, ckpt: Any = None, callbacks: Any = (), **settings: Any) -> Any:
    own = {"method": TRAK(8), "snapshots": "all", "log": False, "optimizer_state": True, **settings}
    trainer = quiet_trainer(
        L.Trainer,
        max_epochs=3,
        callbacks=[AttributionCallback(folder, **own), *callbacks],
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )
    torch.manual_seed(7)
    trainer.fit(module or Net(), loader_of(blobs(26), batch_size=6), ckpt_path=ckpt)
    return trainer


def test_moments_are_those_of_the_optimizer_at_each_snapshot(tmp_path: Path) -> None:
    witness = Witness()
    fit(tmp_path, callbacks=[witness])
    store = FeatureStore.open(tmp_path)
    assert len(store.snapshots) == len(witness.seen) == 3
    for snapshot, seen in zip(store.snapshots, witness.seen, strict=True):
        moments = store.optimizer_state(snapshot.key).moments
        assert moments.keys() == seen.keys() == store.fingerprint.layout.keys()
        for name, own in moments.items():
            assert torch.equal(own.exp_avg, seen[name]["exp_avg"])
            assert torch.equal(own.exp_avg_sq, seen[name]["exp_avg_sq"])
            assert own.step == seen[name]["step"].item() == snapshot.global_step
            first = name.startswith("network.0")
            assert (own.kind, own.learning_rate) == ("AdamW", 0.02 if first else 0.01)
            assert (own.betas, own.eps) == (((0.9, 0.999), 1e-8) if first else ((0.8, 0.9), 1e-6))


@pytest.mark.parametrize("method", [TracIn(preconditioner="adam"), LESS(IdentityProjector())])
def test_methods_that_need_it_have_it_recorded(tmp_path: Path, method: Any) -> None:
    trainer = fit(tmp_path, method=method, optimizer_state=False, log=True)
    assert all(snapshot.optimizer for snapshot in FeatureStore.open(tmp_path).snapshots)
    result = trainer.attribute(target_dataloaders=loader_of(blobs(5, seed=1)))
    assert result.scores.values.any(0).all()


def test_nothing_is_kept_that_nobody_wants(tmp_path: Path) -> None:
    fit(tmp_path, optimizer_state=False)
    assert not list(tmp_path.rglob("optimizer.safetensors"))
    assert '"optimizer"' not in (tmp_path / "manifest.json").read_text()


def test_adams_metric_matches_gradients_one_by_one(tmp_path: Path) -> None:
    data, targets = blobs(26), blobs(5, seed=1)
    method = TracIn(IdentityProjector(), preconditioner="adam")
    trainer = fit(tmp_path, method=method, feature_dtype="float32")
    result = trainer.attribute(target_dataloaders=loader_of(targets))
    store, module = FeatureStore.open(tmp_path), Net().eval()
    expected, norms = torch.zeros(26, 5), torch.zeros(26)
    for snapshot in store.snapshots:
        load_weights(module, store.weights(snapshot.key))
        moments = store.optimizer_state(snapshot.key).moments
        d = torch.cat([
            snapshot.rates[name] / ((m.exp_avg_sq / (1 - m.betas[1] ** m.step)).sqrt() + m.eps).flatten()
            for name, m in moments.items()
        ])  # fmt: skip

        def rows(data: Any, function: Any) -> torch.Tensor:
            found = []
            for x, y in data:
                value = function({}, {}, (x[None], y[None])).sum()
                values = torch.autograd.grad(value, list(module.parameters()))
                gradients = dict(zip(dict(module.named_parameters()), values, strict=True))
                found.append(torch.cat([gradients[name].flatten() for name in moments]))  # noqa: B023 - called here
            return torch.stack(found)

        losses, outputs = rows(data, module.functional_loss), rows(targets, module.functional_output)
        expected -= (losses * d) @ outputs.T / 26
        norms -= (losses * d * rows(data, module.functional_output)).sum(1) / 26
    scale = expected.abs().max().item()
    torch.testing.assert_close(result.scores.values, expected, rtol=1e-3, atol=1e-5 * scale)
    torch.testing.assert_close(result.self_influence, norms, rtol=1e-3, atol=1e-5 * scale)
    assert result.scores.provenance["preconditioner"] == "adam"


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
@pytest.mark.parametrize("settings", [{}, {"method": LESS(), "optimizer_state": False}], ids=["asked", "needed"])
def test_optimizers_without_moments_are_refused_before_training(
    tmp_path: Path, kind: Any, settings: dict[str, Any]
) -> None:
    class Other(Net):
        def configure_optimizers(self) -> Any:
            return kind(self.parameters(), lr=0.01)

    with pytest.raises(AttributionError, match=f"but {kind.__name__}, which updates .network.0.weight., has none"):
        fit(tmp_path / "store", Other(), **settings)
    assert not (tmp_path / "store").exists()


# Resuming -----------------------------------------------------------------------------------------------------------


def same(a: Path, b: Path) -> bool:
    """Whether two stores hold the same, to the last bit."""
    first, second = FeatureStore.open(a), FeatureStore.open(b)
    apart = {"abandoned", "journal"}  # a resumed run draws random numbers anew, and its journal says so
    names = {path.relative_to(a) for path in a.rglob("*.safetensors") if not apart & {*path.parts}}
    for name in names:
        left, right = read_tensors(a / name), read_tensors(b / name)
        assert all(torch.equal(left[key], right[key]) for key in left)
    return first.manifest == second.manifest


def test_run_again_it_is_kept(tmp_path: Path) -> None:
    for folder in ("whole", "again", "again"):
        fit(tmp_path / folder)
    assert same(tmp_path / "whole", tmp_path / "again")
    assert not (tmp_path / "again" / "abandoned").exists()


def test_resumed_from_a_checkpoint(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(tmp_path / "whole", callbacks=[keeper])
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    store = FeatureStore.open(tmp_path / "cut")
    store.set_aside([store.snapshots[-1].key])
    assert list((tmp_path / "cut" / "abandoned").rglob("optimizer.safetensors"))
    fit(tmp_path / "cut", ckpt=tmp_path / "ckpt" / "epoch=1.ckpt")
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_other_moments_are_another_course(tmp_path: Path) -> None:
    """Equal weights and learning rates, but moments that differ."""

    class Shaken(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 2:
                for state in trainer.optimizers[0].state.values():
                    state["exp_avg_sq"] *= 2

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.callbacks.sort(key=lambda callback: isinstance(callback, AttributionCallback))

    fit(tmp_path)
    with pytest.warns(UserWarning, match=r"is written anew from step 15 on; moved epoch=0002"):
        fit(tmp_path, callbacks=[Shaken()])


def test_a_store_without_it_is_written_anew_where_it_is_wanted(tmp_path: Path) -> None:
    fit(tmp_path, optimizer_state=False)
    with pytest.warns(UserWarning, match=r"is written anew from step 5 on; moved epoch=0000"):
        fit(tmp_path)
    fit(tmp_path, optimizer_state=False)  # and what is there is no reason to start anew
    assert all(snapshot.optimizer for snapshot in FeatureStore.open(tmp_path).snapshots)
