"""Errors that know samples by their positions in a batch name them in the data set, wherever the batch came from."""

from __future__ import annotations

import pickle
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cases import loader_of, quiet_trainer
from lightning_attr import AttributionMixin
from lightning_attr.data.loader import DataSource
from lightning_attr.data.memory import MemoryBudget
from lightning_attr.errors import AttributionError, InvalidLabelError, named_samples
from lightning_attr.evaluation.targets import target_outputs
from lightning_attr.methods import GradDot
from lightning_attr.outputs import LanguageModel, PixelMargin
from lightning_attr.projectors import IdentityProjector

WORDS = 5
EMPTY, OUTSIDE = "at least one labelled token, but those at the positions", "labels in \\[0, 5\\), the vocabulary"


class Bigrams(AttributionMixin, L.LightningModule):
    """The smallest language model: logits of a token from the one before."""

    model_output = LanguageModel()

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(WORDS, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(ids)


class BigramLosses(L.LightningModule):
    """The same, attributed by the loss of its training step, which other parts of a batch reach as well."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(WORDS, WORDS)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, labels = batch
        return LanguageModel("mean_loss").loss(self.logits(ids), labels).mean()


class Pixels(AttributionMixin, L.LightningModule):
    """A class for each pixel."""

    model_output = PixelMargin()

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def sentences(n: int = 20, **labels: int) -> TensorDataset:
    """Sentences of six tokens; ``row13=-100`` sets all labels of that row."""
    ids = torch.randint(WORDS, (n, 6), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    for name, label in labels.items():
        changed[int(name.removeprefix("row"))] = label
    return TensorDataset(ids, changed)


def attributed(train: Any, model: Any = None, batch_size: int = 8, targets: Any = None, **settings: Any) -> Any:
    own = {"targets": "train"} if targets is None else {"target_dataloaders": loader_of(targets, batch_size)}
    return quiet_trainer().attribute(
        model=model or Bigrams(),
        train_dataloaders=loader_of(train, batch_size, shuffle=True),
        method=GradDot(IdentityProjector()),
        **own,
        **settings,
    )


@pytest.mark.parametrize("model", [Bigrams, BigramLosses])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"row13": -100}, rf"{EMPTY} \[\d\] of the batch.* Look at dataset\[13\]\.$"),
        ({"row2": -100}, rf"{EMPTY} \[\d\] of the batch.* Look at dataset\[2\]\.$"),
        ({"row17": -100, "row19": -100}, rf"{EMPTY} \[\d, \d\] of the batch.* Look at dataset\[17\], dataset\[19\]\.$"),
        ({"row14": 5}, rf"{OUTSIDE}.* position \d of the batch has the label 5\..* Look at dataset\[14\]\.$"),
        ({"row1": -1}, rf"{OUTSIDE}.* position \d of the batch has the label -1\..* Look at dataset\[1\]\.$"),
    ],
)
def test_training_sentences(model: Any, labels: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidLabelError, match=message):
        attributed(sentences(**labels), model())


def test_target_sentences() -> None:
    with pytest.raises(InvalidLabelError, match=rf"{EMPTY} \[\d\] of the batch.* Look at dataset\[9\]\.$"):
        attributed(sentences(), targets=sentences(12, row9=-100))


def test_rows_are_those_of_the_part_that_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_attr.data.memory._OF_INPUTS", 2**60)  # measure, however small
    monkeypatch.setattr(MemoryBudget, "_fitting", lambda budget, demand, batch_size: 3)
    monkeypatch.setattr(
        "lightning_attr.verification.probe.probe_rows", lambda source: [0, 1, 2, 3]
    )  # else it finds the row
    with pytest.raises(InvalidLabelError, match=rf"{EMPTY} \[2\] of the batch.* Look at dataset\[13\]\.$"):
        attributed(sentences(row13=-100))  # of the rows 8 to 15, the second part


def test_images() -> None:
    x = torch.randn(20, 1, 2, 2)
    for label, message in (
        (-100, r"those at the positions \[\d\] of the batch .* Look at dataset\[13\]\.$"),
        (3, r"labels in \[0, 3\).* position \d of the batch has the label 3\..* Look at dataset\[13\]\.$"),
    ):
        masks = torch.randint(3, (20, 2, 2))
        masks[13] = label
        with pytest.raises(InvalidLabelError, match=message):
            attributed(TensorDataset(x, masks), Pixels())


@pytest.mark.parametrize("row", [1, 9])
def test_targets_of_retrained_models(row: int) -> None:
    source = DataSource.of(loader_of(sentences(12, **{f"row{row}": -100}), shuffle=True), "target")
    with pytest.raises(InvalidLabelError, match=rf"Look at dataset\[{row}\]\.$"):
        target_outputs(quiet_trainer(), Bigrams(), None, source)


def test_a_batch_of_another_size_is_left_alone() -> None:
    # A position in it says nothing about the rows: samples one by one, or pairs that a module made of the batch.
    for size in (1, 6):
        with pytest.raises(InvalidLabelError, match=r"^No label\.$"), named_samples([7, 8, 9]):
            raise InvalidLabelError("No label.", [0], size)


def test_the_first_of_many() -> None:
    message = r"^No label\. Look at dataset\[109\], dataset\[108\], .* dataset\[102\] and 2 more\.$"
    with pytest.raises(InvalidLabelError, match=message), named_samples(range(109, 99, -1)):
        raise InvalidLabelError("No label.", range(10), 10)


def test_invalid_labels_are_bad_arguments_and_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(InvalidLabelError("No label.", [3], 4)))
    assert isinstance(error, ValueError)
    assert isinstance(error, AttributionError)
    assert (str(error), error.positions, error.batch_size) == ("No label.", [3], 4)
