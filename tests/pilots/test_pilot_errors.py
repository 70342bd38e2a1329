"""What cannot be a pilot is refused by name, before anything is trained, and nothing of the store is lost."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pilots.pilot_cases import EPOCHS, Data, Fresh, recorded
from torch import nn

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.methods import TRAK
from lightning_attr.pilots import Pilots

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    return folder, recorded(folder, max_epochs=3)


@pytest.mark.parametrize(
    ("pilots", "kind", "match"),
    [
        (0, ValueError, r"`pilots` of attribute to be an integer >= 1, but got 0\. For no pilots, leave it out"),
        (-1, ValueError, r"`pilots` of attribute to be an integer >= 1, but got -1"),
        ("two", TypeError, r"`pilots` of attribute to be an integer >= 1, Pilots\(\.\.\.\) or None, but got 'two'"),
        (True, TypeError, r"`pilots` of attribute .* but got True"),
        (1.5, TypeError, r"`pilots` of attribute .* but got 1\.5"),
    ],
)
def test_numbers(run: Any, pilots: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        run[1].attribute(pilots=pilots)


@pytest.mark.parametrize(
    ("arguments", "kind", "match"),
    [
        (
            {"count": 0},
            ValueError,
            r"`count` of Pilots to be an integer >= 1, but got 0\. For none, leave `pilots` out",
        ),
        ({"count": 1, "epochs": 0}, ValueError, r"`epochs` of Pilots to be an integer >= 1, or None, but got 0"),
        ({"count": 1, "module": Fresh()}, TypeError, r"`module` of Pilots to be a function that makes a module"),
        ({"count": 1, "trainer": 3}, TypeError, r"`trainer` of Pilots to be a function of the number of epochs"),
    ],
)
def test_requests(arguments: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        Pilots(**arguments)


class Unsaved(BlobClassifier):
    """Keeps no hyperparameters."""


class Twice(Fresh):
    """Its hyperparameters are not what it was called with."""

    def __init__(self, width: int = 3) -> None:
        super().__init__(0.1, width)
        self.hparams["width"] *= 2


class Starred(Fresh):
    def __init__(self, *widths: int) -> None:
        super().__init__(0.1, widths[0])


class Wrapped(Fresh):
    def __init__(self, network: nn.Module) -> None:
        super().__init__(0.1)
        self.network = network


class Seeded(Fresh):
    """The same weights each time."""

    value = 0.0

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            nn.init.constant_(parameter, self.value)


class Ones(Seeded):
    value = 1.0


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.filterwarnings("ignore:Attribute 'network' is an instance")
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: Unsaved(seed=1),
            r"nothing tells which `size` it was made with\. Call `self.save_hyperparameters\(\)`",
        ),
        (
            lambda: Starred(5),
            r"cannot be made again of its hyperparameters \(IndexError: .*Pass `pilots=Pilots\(1, mod",
        ),
        (lambda: Twice(3), r"made again of its hyperparameters it has another `width`: 12 and not 6\. Pass"),
        (lambda: Wrapped(network()), r"shares its parameter `network.0.weight` with the trained one"),
    ],
)
def test_modules_that_cannot_be_made_again(tmp_path: Path, make: Any, match: str) -> None:
    trainer = recorded(tmp_path, make(), max_epochs=1)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(AttributionError, match=match):
        trainer.attribute(pilots=1)
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert trainer.attribute().scores.values.isfinite().all()


class Backbone(Fresh):
    """Its first layer is loaded and frozen by whoever makes it."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.network[0].requires_grad_(False)


class Unfrozen(Fresh):
    """Does not freeze what the run froze, and has the run's values there."""

    weights: Any = None

    def __init__(self) -> None:
        super().__init__(0.1)
        if self.weights is not None:
            self.network[0].load_state_dict(self.weights)


def test_frozen_weights_that_were_loaded_after_the_constructor(tmp_path: Path) -> None:
    trainer = recorded(tmp_path, Backbone(), max_epochs=1)
    with pytest.raises(AttributionError, match=r"`network.0.weight`, which the run kept frozen, has other values"):
        trainer.attribute(pilots=1)


def test_weights_that_the_run_kept_frozen_are_not_trained(tmp_path: Path) -> None:
    module = Unfrozen()
    module.network[0].requires_grad_(False)
    trainer = recorded(tmp_path, module, max_epochs=1)
    Unfrozen.weights = copy.deepcopy(module.network[0].state_dict())
    with pytest.raises(AttributionError, match=r"Pilot 0 trained the parameter `network.0.bias`, which the run kept"):
        trainer.attribute(pilots=Pilots(1, Unfrozen))
    assert all(snapshot.pilot is None for snapshot in FeatureStore.open(tmp_path).snapshots)


def test_functions_that_make_something_else(run: Any) -> None:
    folder, trainer = run
    same = Fresh()
    cases: list[tuple[Pilots, type[Exception], str]] = [
        (Pilots(1, lambda: Fresh(width=9)), StoreMismatchError, "parameters of the one made again are not the run's"),
        (Pilots(2, lambda: same, epochs=1), AttributionError, "`module` returned the same Fresh twice"),
        (Pilots(1, lambda: 3), TypeError, "`module` to return a LightningModule, but got int"),  # type: ignore[arg-type, return-value]
        (
            Pilots(1, trainer=lambda epochs: quiet_trainer(max_epochs=9)),
            AttributionError,
            "Expected the function `trainer` of Pilots to make a Trainer with max_epochs=2, .* its max_epochs is 9",
        ),
        (
            Pilots(1, trainer=lambda epochs: quiet_trainer(max_epochs=-1)),
            AttributionError,
            "max_epochs=2, .* its max_epochs is -1",
        ),
        (
            Pilots(1, trainer=lambda epochs: quiet_trainer(max_epochs=epochs, gradient_clip_val=1.0)),
            AttributionError,
            r"which had gradient_clip_val=None, but this Trainer has gradient_clip_val=1\.0",
        ),
    ]
    for pilots, kind, match in cases:
        store = FeatureStore.open(folder)
        store.set_aside([snapshot.key for snapshot in store.snapshots if snapshot.pilot is not None])
        with pytest.raises(kind, match=match):
            trainer.attribute(pilots=pilots)


class Hooked(L.Callback):
    def on_after_backward(self, *args: Any) -> None:
        """May change gradients."""


def test_trainers_that_are_not_made_again(tmp_path: Path) -> None:
    trainer = recorded(tmp_path, max_epochs=1, callbacks=[ModelCheckpoint(tmp_path / "c"), Hooked()], **CHECKPOINTS)
    with pytest.raises(
        AttributionError, match=r"its callback Hooked may change training, and can not be copied\. Pass"
    ):
        trainer.attribute(pilots=1)
    other = quiet_trainer(gradient_clip_val=2.0)
    with pytest.raises(AttributionError, match=r"had gradient_clip_val=None, but this Trainer has gradient_clip_val=2"):
        other.attribute(Data(), model=Fresh(0.2), store=tmp_path, pilots=1)
    many = quiet_trainer(strategy="ddp", devices=2)
    with pytest.raises(
        AttributionError, match=r"its strategy is DDPStrategy with 2 process\(es\), and a pilot takes one"
    ):
        many.attribute(Data(), model=Fresh(0.2), store=tmp_path, pilots=1)


CHECKPOINTS = {"enable_checkpointing": True}


def test_another_loader_than_the_runs(run: Any) -> None:
    match = r"took 15 optimizer steps in 3 epoch\(s\), but here an epoch has 2\. Use the run's batch size"
    with pytest.raises(AttributionError, match=match):
        quiet_trainer().attribute(Data(batch_size=20), model=Fresh(0.2), store=run[0], pilots=1)


def test_a_loader_in_another_order(run: Any) -> None:
    match = r"whose loader drew samples by RandomSampler, but this one has SequentialSampler\. Pass the datamodule"
    loaders = {"train_dataloaders": loader_of(blobs(40)), "target_dataloaders": loader_of(blobs(3, seed=1))}
    with pytest.raises(AttributionError, match=match):
        quiet_trainer().attribute(model=Fresh(0.2), store=run[0], pilots=1, **loaders)


def test_no_run_to_be_like(tmp_path: Path) -> None:
    with pytest.raises(AttributionError, match=r"Pilots are kept in the store of a recorded run, and nothing is kept"):
        quiet_trainer().attribute(Data(), model=Fresh(), pilots=1)
    with pytest.raises(
        AttributionError, match=r"recorded run, but .*none holds none yet\. Fit with AttributionCallback"
    ):
        quiet_trainer().attribute(Data(), model=Fresh(), store=tmp_path / "none", pilots=1)
    quiet_trainer().attribute(Data(), model=Fresh(), store=tmp_path / "now", method=TRAK(16))
    with pytest.raises(
        AttributionError, match=r"does not tell how many it had\. Say how long: `pilots=Pilots\(1, epochs"
    ):
        quiet_trainer().attribute(Data(), model=Fresh(), store=tmp_path / "now", pilots=1)
    result = quiet_trainer().attribute(Data(), model=Fresh(), store=tmp_path / "now", pilots=Pilots(1, epochs=2))
    assert "parts" in result.scores.provenance


def test_a_run_without_a_limit_tells_its_length_by_where_it_ended(tmp_path: Path) -> None:
    trainer = recorded(tmp_path, max_epochs=-1, max_steps=5 * EPOCHS)
    trainer.attribute(pilots=1)
    assert [s.global_step for s in FeatureStore.open(tmp_path).snapshots if s.pilot is not None] == [10]


def test_pilots_of_another_length(tmp_path: Path) -> None:
    trainer = recorded(tmp_path, max_epochs=2)
    trainer.attribute(pilots=1)
    with pytest.raises(
        StoreMismatchError, match=r"has pilots of 1 epoch\(s\), but here `epochs` is 2\. Leave"
    ) as error:
        trainer.attribute(pilots=Pilots(1, epochs=2))
    remedy = re.search(r"set_aside\((\[.*?\])\)", str(error.value))
    assert remedy is not None
    assert remedy[1] == "['pilot=0000']"


def test_a_pilot_that_diverges(tmp_path: Path) -> None:
    trainer = recorded(tmp_path, max_epochs=2)

    class Diverging(Fresh):
        def on_train_end(self) -> None:
            with torch.no_grad():
                self.network[0].bias.fill_(float("nan"))

    with pytest.raises(
        AttributionError, match=r"Pilot 0 diverged: its parameter `network.0.bias` holds NaN or Inf\. Low"
    ):
        trainer.attribute(pilots=Pilots(1, Diverging))
    assert trainer.attribute().scores.values.isfinite().all()


@pytest.mark.filterwarnings("ignore:Pilots train a fresh")  # the run began otherwise, so that it is no pilot
def test_pilots_in_which_nothing_is_random(tmp_path: Path) -> None:
    trainer = quiet_trainer()
    ordered = loader_of(blobs(40))
    L.seed_everything(3, verbose=False)
    callback = AttributionCallback(tmp_path, TRAK(16), log=False)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(Ones(), ordered)
    arguments = {"train_dataloaders": ordered, "target_dataloaders": loader_of(blobs(3, seed=1)), "model": Seeded()}
    with pytest.raises(AttributionError, match=r"Pilot 1 came out as pilot=0000 did, to the last bit: nothing in its"):
        trainer.attribute(**arguments, store=tmp_path, pilots=2)
    assert [s.key for s in FeatureStore.open(tmp_path).snapshots if s.pilot is not None] == ["pilot=0000"]
