"""What our calls and our reading of the data would use up or move is put back, or refused by its name."""

from __future__ import annotations

import array
import itertools
import multiprocessing
import queue
import random
from collections import UserDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from cases import quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.data.loader import DataSource
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.methods import GradDot
from lightning_attr.projectors import IdentityProjector
from lightning_attr.user_code.calls import user_call
from lightning_attr.user_code.generators import find_generators, reseed_generator
from lightning_attr.user_code.reading_state import unchanged_data
from lightning_attr.user_code.training_step import training_loss
from lightning_attr.verification.repeated_reads import check_repeated_reads

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
GENERATOR = np.random.default_rng(0)
COUNTS: dict[str, int] = {}
CALLS = 0


class Net(L.LightningModule):
    """A regression whose loss has a factor that the step computes."""

    def __init__(self, factor: Callable[[], float] = lambda: 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 1)
        self.factor = factor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean() * self.factor()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


# What a step takes from ---------------------------------------------------------------------------------------------


class Keeps:
    """A factor from something that it keeps."""

    shared: ClassVar[deque[int]] = deque(maxlen=3)
    calls = 0

    def __init__(self, kept: Any, take: Callable[[Keeps], Any]) -> None:
        self.kept = kept
        self.take = take

    def __call__(self) -> float:
        return float(self.take(self))


def fill(kept: Any, values: Any) -> Any:
    for value in values:
        kept.put(value)
    return kept


def class_wide(keeps: Keeps) -> float:
    Keeps.calls += 1
    Keeps.shared.append(Keeps.calls)
    return sum(Keeps.shared)


def global_wide(keeps: Keeps) -> float:
    global CALLS
    CALLS += 1
    COUNTS["calls"] = CALLS
    return CALLS + len(COUNTS) + GENERATOR.normal()


def with_default(keeps: Keeps, seen: list[int] = []) -> float:  # noqa: B006 - as users write it
    seen.append(1)
    return len(seen)


def shared_value(keeps: Keeps) -> float:
    keeps.kept.value += 1
    return float(keeps.kept.value)


def in_array(keeps: Keeps) -> float:
    keeps.kept.append(1)
    return len(keeps.kept)


def enclosed() -> Callable[[Keeps], float]:
    calls = 0

    def take(keeps: Keeps) -> float:
        nonlocal calls
        calls += 1
        return calls

    return take


PUT_BACK: dict[str, Callable[[], Keeps]] = {
    "list iterator": lambda: Keeps(iter([1.0, 2.0, 3.0, 4.0]), lambda own: next(own.kept)),
    "count": lambda: Keeps(itertools.count(3, 2), lambda own: next(own.kept)),
    "queue": lambda: Keeps(fill(queue.Queue(), range(1, 5)), lambda own: own.kept.get_nowait()),
    "class variables": lambda: Keeps(None, class_wide),
    "global variables": lambda: Keeps(None, global_wide),
    "default argument": lambda: Keeps(None, with_default),
    "enclosed variable": lambda: Keeps(None, enclosed()),
    "shared value": lambda: Keeps(multiprocessing.Value("i", 0), shared_value),
    "array": lambda: Keeps(array.array("i"), in_array),
    "bytearray": lambda: Keeps(bytearray(b"1"), in_array),
    "user dict": lambda: Keeps(UserDict(a=1, b=2), lambda own: own.kept.popitem()[1]),
}


@pytest.mark.parametrize("make", PUT_BACK.values(), ids=list(PUT_BACK))
def test_what_a_step_keeps_is_put_back(make: Callable[[], Keeps]) -> None:
    module, batch = Net(make()), (X,)
    losses = [training_loss(module, batch).item() for _ in range(3)]
    assert losses == [module.training_step(batch, 0).item()] * 3
    assert module.training_step(batch, 0).item() != losses[0]  # it does move, where we do not put it back


def test_a_file_is_read_on_from_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "factors.txt").write_text("1.5\n2.5\n3.5\n")
    with (tmp_path / "factors.txt").open() as file:
        module = Net(Keeps(file, lambda own: own.kept.readline()))
        losses = [training_loss(module, (X,)).item() for _ in range(2)]
        assert losses == [module.training_step((X,), 0).item()] * 2
        assert float(file.readline()) == 2.5


def next_or_new(keeps: Keeps) -> float:
    if keeps.kept is None:
        keeps.kept = iter(DataLoader(torch.arange(5.0), shuffle=True))
    return float(next(keeps.kept))


def caught(keeps: Keeps) -> float:
    try:
        return float(next(keeps.kept))
    except Exception:
        return 0.0


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Keeps((i for i in range(9)), lambda own: next(own.kept)), r"`factor.kept` \(generator\)"),
        (lambda: Keeps((i for i in range(9)), lambda own: own.kept.send(None)), r"`factor.kept` \(generator\)"),
        (lambda: Keeps((i for i in range(9)), caught), r"`factor.kept` \(generator\)"),
        (lambda: Keeps(iter(DataLoader(X)), lambda own: next(own.kept)[0, 0]), r"`.*` \(_Single\w+\)"),
        (lambda: Keeps(None, next_or_new), r"`factor.kept` \(_SingleProcessDataLoaderIter\)"),
        (lambda: Keeps([zip(range(9))], lambda own: next(own.kept[0])[0]), r"`factor.kept\[0\]` \(zip\)"),
    ],
)
def test_what_cannot_be_put_back_is_refused_by_name_before_training(make: Callable[[], Keeps], named: str) -> None:
    keeps = make()
    trainer = quiet_trainer(max_epochs=1, callbacks=[AttributionCallback()])
    with pytest.raises(AttributionError, match=f"Attribution cannot read {named}: .*training would see other items"):
        trainer.fit(Net(keeps), DataLoader(TensorDataset(X)))
    assert trainer.global_step == 0
    kept = keeps.kept[0] if isinstance(keeps.kept, list) else keeps.kept
    assert kept is None or type(kept).__name__ != "HeldStream"


def test_an_iterator_that_is_not_read_does_no_harm() -> None:
    module = Net()
    module.spare = zip(range(3))
    with user_call(module, "step"):
        assert hasattr(module.spare, "__next__")
    assert next(module.spare) == (0,)


# What reading the data moves ----------------------------------------------------------------------------------------


class Reads(Dataset[Any]):
    """Rows that a function makes of their values; it may do so with what the data set keeps."""

    def __init__(self, make: Callable[[Reads, Tensor], Tensor], kept: Any = None) -> None:
        self.values = X.clone()
        self.make = make
        self.kept = kept
        self.read = 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> tuple[Tensor]:
        self.read += 1
        return (self.make(self, self.values[row]),)


def drifting(own: Reads, x: Tensor) -> Tensor:
    return x * (1 + 0.1 * own.read)


def in_place(own: Reads, x: Tensor) -> Tensor:
    return x.mul_(0.9).clone()


def global_noise(own: Reads, x: Tensor) -> Tensor:
    return x + float(GENERATOR.normal())


def caching(own: Reads, x: Tensor) -> Tensor:
    return own.kept.setdefault(float(x[0]), x)


@pytest.mark.parametrize("make", [drifting, in_place, global_noise, caching])
def test_reading_leaves_the_data_as_they_were(make: Callable[[Reads, Tensor], Tensor]) -> None:
    dataset, state = Reads(make, {}), GENERATOR.bit_generator.state
    with unchanged_data(dataset):
        _ = [dataset[row] for row in range(12)]
    assert (dataset.read, dataset.kept) == (0, {})
    assert torch.equal(dataset.values, X)
    assert GENERATOR.bit_generator.state == state


def fitted(dataset: Reads, *callbacks: Any, **settings: Any) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(0)
    module = Net()
    trainer = quiet_trainer(max_epochs=3, callbacks=list(callbacks))
    trainer.fit(module, DataLoader(dataset, batch_size=4, shuffle=True, **settings))
    return trainer, [tensor.clone() for tensor in module.state_dict().values()]


@pytest.mark.parametrize("make", [drifting, in_place, global_noise])
def test_training_on_data_that_drift_is_what_it_was(
    make: Callable[[Reads, Tensor], Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reseed_generator(GENERATOR, 0)
    _, expected = fitted(Reads(make))
    reseed_generator(GENERATOR, 0)
    dataset = Reads(make)
    trainer, found = fitted(dataset, AttributionCallback(tmp_path, method=GradDot(IdentityProjector())))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    if make is global_noise:
        trainer.attribute(targets="train")
        return
    name = "Reads.read" if make is drifting else "Reads.values"
    assert "Reading the training data changes `Reads.read`" in caplog.text
    assert f"`{name}`" in caplog.text
    with pytest.raises(StoreMismatchError, match=rf"`{name}`.*, and the samples with it: they are no longer"):
        trainer.attribute(targets="train")


def test_a_collate_function_that_counts_sees_every_sample_alike() -> None:
    calls = 0

    def collate(items: list[Any]) -> Any:
        nonlocal calls
        calls += 1
        return [calls * part for part in default_collate(items)]

    source = DataSource.of(DataLoader(TensorDataset(X), batch_size=4, collate_fn=collate), "training")
    check_repeated_reads(source, range(4))
    assert source.form.drifting == ("calls",)
    assert [torch.equal(source.collated([row])[0], X[[row]]) for row in range(3)] == [True] * 3
    assert calls == 0


def test_what_nothing_repeats_is_told(caplog: pytest.LogCaptureFixture) -> None:
    own = random.SystemRandom()
    source = DataSource.of(DataLoader(Reads(lambda _, x: x + own.random())), "training")
    check_repeated_reads(source, range(4))
    assert source.form.random
    assert "dataset[0] of the training data has other values each time it is read" in caplog.text


@pytest.mark.parametrize("kept", [np.zeros((12, 400_000), np.float32), torch.zeros(12, 400_000)])
def test_large_data_that_are_written_to_are_refused(kept: Any) -> None:
    def write(own: Reads, x: Tensor) -> Tensor:
        own.kept[0, 0] += 1
        return x + float(own.kept[0, 0])

    source = DataSource.of(DataLoader(Reads(write, kept)), "training")
    with pytest.raises(AttributionError, match=r"changes `Reads.kept`|`Reads.kept` changed while attribution read"):
        check_repeated_reads(source, range(4))


def test_generators_of_modules_and_helpers_are_found() -> None:
    def noisy(x: Tensor) -> Tensor:
        return global_noise(None, x)  # type: ignore[arg-type]

    assert any(found is GENERATOR for found in find_generators(noisy))


class Endless(DataLoader[Any]):
    """Keeps an iterator over its batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.iterator = super().__iter__()

    def __iter__(self) -> Any:
        for _ in range(len(self)):
            try:
                batch = next(self.iterator)
            except StopIteration:
                self.iterator = super().__iter__()
                batch = next(self.iterator)
            yield batch


def test_a_loader_that_keeps_its_iterator_goes_on_from_it(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [AttributionCallback(tmp_path)]):
        torch.manual_seed(0)
        module, trainer = Net(), quiet_trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(module, Endless(TensorDataset(X), batch_size=4, shuffle=True))
        weights.append(module.layer.weight.clone())
    assert torch.equal(*weights)
    assert trainer.attribute(targets="train").scores.shape == (12, 12)
