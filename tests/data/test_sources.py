"""Which training data and which targets: from a datamodule, loaders, hooks, or the fit that came before."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset, random_split

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.data.sources import target_source, train_source
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.methods import TRAK

# The shared module has a validation step; not every test validates.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

KINDS = ("predict", "test", "val", "train")
SIZES = {"predict": 5, "test": 6, "val": 7, "train": 20}


class Data(L.LightningDataModule):
    """Defines loaders of the given kinds, and notes what is called."""

    def __init__(self, kinds: tuple[str, ...] = KINDS) -> None:
        super().__init__()
        self.calls: list[str] = []
        for kind in kinds:
            setattr(self, f"_{kind}", blobs(SIZES[kind], seed=len(kind)))

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")


def datamodule_with(*kinds: str) -> Data:
    hooks = {f"{kind}_dataloader": lambda self, kind=kind: loader_of(getattr(self, f"_{kind}")) for kind in kinds}
    return type("DataWith", (Data,), hooks)(kinds)


def module_with(*kinds: str) -> Any:
    """A module with loaders of its own, whose data exist from `setup` on."""

    def setup(self: Any, stage: str) -> None:
        self.data = {kind: blobs(SIZES[kind], seed=len(kind)) for kind in kinds}

    hooks = {f"{kind}_dataloader": lambda self, kind=kind: loader_of(self.data[kind]) for kind in kinds}
    return type("ModuleWith", (BlobClassifier,), {"setup": setup, **hooks})()


def attribute(trainer: Any, *args: Any, **settings: Any) -> Any:
    return trainer.attribute(*args, method=TRAK(proj_dim=16), **settings)


@pytest.mark.parametrize("make", [datamodule_with, module_with])
@pytest.mark.parametrize("first", range(4))
def test_auto_takes_the_first_kind_that_is_defined(make: Any, first: int) -> None:
    trainer, owner = quiet_trainer(), make(*KINDS[first:])
    given = {"model": owner} if make is module_with else {"datamodule": owner, "model": BlobClassifier()}
    assert attribute(trainer, **given).scores.shape == (SIZES["train"], SIZES[KINDS[first]])


@pytest.mark.parametrize("make", [datamodule_with, module_with])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_name_their_loader(make: Any, kind: str) -> None:
    trainer, owner = quiet_trainer(), make(*KINDS)
    given = {"model": owner} if make is module_with else {"datamodule": owner, "model": BlobClassifier()}
    assert attribute(trainer, **given, targets=kind).scores.shape == (SIZES["train"], SIZES[kind])


def test_datamodule_is_set_up_for_what_is_read_and_for_nothing_else() -> None:
    data = datamodule_with("train", "test")
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(BlobClassifier(), data)
    fitted, data.calls = data.calls, []
    attribute(trainer, data)
    assert fitted[:2] == ["prepare_data", "fit"]
    assert data.calls == ["prepare_data", "test"]  # the training loader of the fit is at hand
    assert data.trainer is trainer


def test_trainer_of_a_new_datamodule_is_put_back() -> None:
    data = datamodule_with("train")
    attribute(quiet_trainer(), data, model=BlobClassifier())
    assert data.trainer is None


@pytest.mark.parametrize("kind", ["predict", "test", "val"])
@pytest.mark.parametrize("make", [datamodule_with, module_with])
def test_missing_kind_of_targets(make: Any, kind: str) -> None:
    owner = make("train")
    given = {"model": owner} if make is module_with else {"datamodule": owner, "model": BlobClassifier()}
    with pytest.raises(ValueError, match=rf"neither datamodule nor module defines `{kind}_dataloader`"):
        attribute(quiet_trainer(), **given, targets=kind)


class Stubs(L.LightningDataModule):
    """A base class that defines every loader; subclasses set the data that they have."""

    def __init__(self, **sets: Any) -> None:
        super().__init__()
        self.sets = {"train": blobs(20), **sets}

    def loader(self, kind: str) -> Any:
        if kind not in self.sets:
            raise RuntimeError(f"{type(self).__name__} has no {kind} data.")
        return loader_of(self.sets[kind])

    def train_dataloader(self) -> Any:
        return self.loader("train")

    def val_dataloader(self) -> Any:
        return self.loader("val")

    def test_dataloader(self) -> Any:
        return self.loader("test")

    def predict_dataloader(self) -> Any:
        return self.loader("predict")


class Mine(Stubs):
    """Sets some of them."""


UNLABELLED = TensorDataset(blobs(5).tensors[0])


def test_auto_passes_over_stubs_and_data_without_labels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    plain = {"model": BlobClassifier(), "method": TRAK(proj_dim=16)}
    expected = quiet_trainer().attribute(datamodule_with("train", "test"), **plain, targets="test").scores.values
    data = Mine(train=blobs(20, seed=5), test=blobs(6, seed=4), predict=UNLABELLED)
    assert torch.equal(quiet_trainer().attribute(data, **plain).scores.values, expected)
    said = [record.message for record in caplog.records if "Attribution targets" in record.message]
    assert said == [
        "Attribution targets are those of `test_dataloader`, because `predict_dataloader` gives others than training "
        "does: a batch of targets is [Tensor] and one of training samples [Tensor, Tensor]. Choose others by `targets`."
    ]
    caplog.clear()
    assert quiet_trainer().attribute(Mine(val=blobs(7)), **plain).scores.shape == (20, 7)
    said = [record.message for record in caplog.records if "Attribution targets" in record.message]
    assert said == [
        "Attribution targets are those of `val_dataloader`, because `predict_dataloader` raised RuntimeError: Mine has "
        "no predict data; `test_dataloader` raised RuntimeError: Mine has no test data. Choose others by `targets`."
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, of Lightning
def test_auto_says_aloud_that_the_training_samples_are_all_it_has_found() -> None:
    with pytest.warns(UserWarning, match="targets are the training samples themselves, because.*Mine has no val data"):
        assert attribute(quiet_trainer(), Mine(), model=BlobClassifier()).scores.shape == (20, 20)


def test_auto_passes_over_a_stream_and_several_loaders() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(torch.rand(3))

    data = Mine(predict=Stream(), val=blobs(7))
    data.test_dataloader = lambda: [loader_of(blobs(6)), loader_of(blobs(6))]
    assert attribute(quiet_trainer(), data, model=BlobClassifier()).scores.shape == (20, 7)
    data.val_dataloader = data.test_dataloader
    with pytest.raises(TypeError, match="an IterableDataset, differ: its samples have no index"):  # of the first kind
        attribute(quiet_trainer(), data, model=BlobClassifier())


def test_a_named_kind_raises_what_is_wrong_with_it() -> None:
    data = Mine(predict=UNLABELLED)
    with pytest.raises(RuntimeError, match="Mine has no test data"):
        attribute(quiet_trainer(), data, model=BlobClassifier(), targets="test")
    message = r"a batch of targets is \[Tensor\] and one of training samples \[Tensor, Tensor\].*`target_function`"
    with pytest.raises(AttributionError, match=message) as raised:
        attribute(quiet_trainer(), data, model=BlobClassifier(), targets="predict")
    assert isinstance(raised.value.__cause__, TypeError)


def test_targets_of_another_form_are_the_modules_to_take() -> None:
    class Both(BlobClassifier):
        def attribution_step(self, batch: Any) -> Any:
            return self(batch[0]), batch[1] if len(batch) == 2 else self(batch[0]).argmax(1)

    data = Mine(predict=UNLABELLED)
    for targets in ("auto", "predict"):
        assert attribute(quiet_trainer(), data, model=Both(), targets=targets).scores.shape == (20, 5)
    confidence = {"target_function": lambda module, batch: module(batch[0]).amax(1)}
    assert attribute(quiet_trainer(), data, model=BlobClassifier(), **confidence).scores.shape == (20, 5)


def test_unknown_targets() -> None:
    message = r"`targets` of attribute to be 'auto', .* or 'train', but got 'valid'\. Did you mean 'val'\?"
    with pytest.raises(ValueError, match=message):
        attribute(quiet_trainer(), datamodule_with("train"), model=BlobClassifier(), targets="valid")


@pytest.mark.parametrize("make", [datamodule_with, module_with])
def test_no_training_data(make: Any) -> None:
    owner = make("test")
    given = {"model": owner} if make is module_with else {"datamodule": owner, "model": BlobClassifier()}
    with pytest.raises(ValueError, match="Expected training data to attribute to, but found none"):
        attribute(quiet_trainer(), **given)


@pytest.mark.parametrize(("given", "role"), [("train_dataloaders", "training"), ("target_dataloaders", "target")])
def test_no_loader_and_several(given: str, role: str) -> None:
    loader = loader_of(blobs(4))
    arguments = {"train_dataloaders": loader, "target_dataloaders": loader}
    with pytest.raises(TypeError, match=rf"Expected argument `{given}` of attribute to be one .*, but got \[\]"):
        attribute(quiet_trainer(), model=BlobClassifier(), **arguments | {given: []})
    arguments[given] = [loader] * 2
    with pytest.raises(TypeError, match=f"Expected one torch DataLoader for the {role} data, but got 2 loaders"):
        attribute(quiet_trainer(), model=BlobClassifier(), **arguments)


class Wrapped(BlobClassifier):
    """Takes batches in the collection that their loader came in, as training gives them."""

    def attribution_step(self, batch: Any) -> Any:
        (inner,) = batch.values() if isinstance(batch, dict) else batch
        return super().attribution_step(inner)


@pytest.mark.parametrize("wrap", [lambda loader: [loader], lambda loader: {"only": loader}])
def test_one_loader_in_a_collection_keeps_it_as_in_training(wrap: Any) -> None:
    train, target = loader_of(blobs(9)), loader_of(blobs(4))
    expected = attribute(quiet_trainer(), model=BlobClassifier(), train_dataloaders=train, target_dataloaders=target)
    for given in (target, wrap(target)):
        result = attribute(quiet_trainer(), model=Wrapped(), train_dataloaders=wrap(train), target_dataloaders=given)
        assert torch.equal(result.scores.values, expected.scores.values)
    result = attribute(
        quiet_trainer(), model=BlobClassifier(), train_dataloaders=train, target_dataloaders=wrap(target)
    )
    assert torch.equal(result.scores.values, expected.scores.values)


def test_loaders_win_over_the_datamodule() -> None:
    data, model = datamodule_with("train", "test"), BlobClassifier()
    train, target = loader_of(blobs(9)), loader_of(blobs(4))
    shapes = [
        attribute(quiet_trainer(), data, model=model, **given).scores.shape
        for given in ({"train_dataloaders": train}, {"target_dataloaders": target})
    ]
    assert shapes == [(9, SIZES["test"]), (SIZES["train"], 4)]


# After fit --------------------------------------------------------------------------------------------------------


def fitted(train: Any, val: Any = None, **settings: Any) -> Any:
    trainer = quiet_trainer(max_epochs=2, num_sanity_val_steps=0, **settings)
    if isinstance(train, L.LightningDataModule):
        trainer.fit(BlobClassifier(), train)
    else:
        trainer.fit(BlobClassifier(), train, val)
    return trainer


def test_loaders_of_the_fit_are_attributed_without_arguments() -> None:
    train, val = blobs(20), blobs(7, seed=1)
    trainer = fitted(loader_of(train, shuffle=True), loader_of(val))
    assert train_source(trainer, trainer.lightning_module, None).dataset is train
    target = target_source(trainer, trainer.lightning_module, None)
    assert target is not None
    assert target.dataset is val
    shapes = [attribute(trainer, targets=targets).scores.shape for targets in ("auto", "val", "train", "auto")]
    assert shapes == [(20, 7), (20, 7), (20, 20), (20, 7)]


def test_without_validation_the_training_data_are_their_own_targets() -> None:
    assert attribute(fitted(loader_of(blobs(20)))).scores.shape == (20, 20)


@pytest.mark.parametrize("targets", ["auto", "val", "train", "test", "predict"])
def test_datamodule_of_the_fit_is_attributed_without_arguments(targets: str) -> None:
    trainer = fitted(datamodule_with(*KINDS))
    kind = "predict" if targets == "auto" else targets
    assert attribute(trainer, targets=targets).scores.shape == (SIZES["train"], SIZES[kind])


def test_another_datamodule_than_that_of_the_fit_gives_its_own_training_data() -> None:
    trainer = fitted(loader_of(blobs(9)))
    assert attribute(trainer, datamodule_with("train")).scores.shape == (SIZES["train"], SIZES["train"])
    trainer = fitted(datamodule_with("train"), callbacks=[AttributionCallback("run", method=TRAK(proj_dim=16))])
    other = datamodule_with("train", "test")
    other._train = blobs(9)
    assert attribute(trainer, other, store="other").scores.shape == (9, SIZES["test"])


class RandomSplit(L.LightningDataModule):
    """Splits anew, and otherwise, in every process and at every call of `setup("fit")`."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = 0

    def setup(self, stage: str) -> None:
        if stage in ("fit", "validate"):
            self.seed += 1
            self.train, self.val = random_split(blobs(40), [30, 10], torch.Generator().manual_seed(self.seed))

    def train_dataloader(self) -> Any:
        return loader_of(self.train, shuffle=True)

    def val_dataloader(self) -> Any:
        return loader_of(self.val)

    def test_dataloader(self) -> Any:
        return loader_of(blobs(5, seed=3))


def seen_by_attribute(trainer: Any, monkeypatch: pytest.MonkeyPatch, *args: Any, **settings: Any) -> list[Any]:
    """Attributes, and returns the data sets of training data and targets."""
    from lightning_attr.attribution import trainer as home

    seen: list[Any] = []

    class Spy(home.AttributionStep):
        def __init__(self, *inner: Any, **named: Any) -> None:
            super().__init__(*inner, **named)
            train, targets = self.request.train, self.request.targets
            seen[:] = [train.dataset, targets and targets.dataset]

    monkeypatch.setattr(home, "AttributionStep", Spy)
    attribute(trainer, *args, **settings)
    return seen


@pytest.mark.parametrize("before", ["nothing", "attribute", "test", "validate"])
def test_random_split_of_the_fit_is_what_is_attributed(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = RandomSplit()
    trainer = fitted(data, callbacks=[AttributionCallback("run", method=TRAK(proj_dim=16))])
    train, val = data.train, data.val
    if before == "attribute":
        attribute(trainer, data)
    elif before != "nothing":
        getattr(trainer, before)(trainer.lightning_module, data, verbose=False)
    for arguments in ((), (data,)):
        assert seen_by_attribute(trainer, monkeypatch, *arguments, targets="test")[0] is train
    if before in {"nothing", "attribute"}:
        assert seen_by_attribute(trainer, monkeypatch, targets="val") == [train, val]
        assert data.train is train


def test_random_split_is_refused_from_another_process() -> None:
    trainer = fitted(RandomSplit(), callbacks=[AttributionCallback("run", method=TRAK(proj_dim=16))])
    other = RandomSplit()
    other.seed = 7
    with pytest.raises(StoreMismatchError, match="a random split without a fixed seed does that"):
        quiet_trainer().attribute(other, model=trainer.lightning_module, store="run")


def test_random_streams_are_put_back_where_a_datamodule_draws() -> None:
    class Draws(RandomSplit):
        def setup(self, stage: str) -> None:
            torch.rand(3)
            super().setup("fit")

    before = torch.get_rng_state()
    attribute(quiet_trainer(), Draws(), model=BlobClassifier())
    assert torch.equal(torch.get_rng_state(), before)
