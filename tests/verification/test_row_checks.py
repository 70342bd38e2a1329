"""A batch holds its samples, each in its place, or is refused by name; what cannot be sliced is run one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from cases import loader_of, quiet_trainer
from lightning_attr import AttributionMixin, attribute
from lightning_attr.data.labels_at_hand import without_label
from lightning_attr.data.loader import DataSource
from lightning_attr.errors import AttributionError, BatchDependenceError, BatchRowsError
from lightning_attr.methods import GradDot, Influence, RepresentationSimilarity
from lightning_attr.outputs import Regression
from lightning_attr.projectors import IdentityProjector
from lightning_attr.verification.probe_rows import probe_rows

N = 11
G = torch.Generator().manual_seed(0)
LENGTHS = [2 + (3 * i) % 5 for i in range(N)]
SEQUENCES = [(torch.randn(length, 3, generator=G), torch.randn(1, generator=G)) for length in LENGTHS]
WORDS = [(torch.randint(7, (length,), generator=G), torch.randn(1, generator=G)) for length in LENGTHS]


class Rows(Dataset[Any]):
    """Samples in a list, with another name than any of ours."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Model(L.LightningModule):
    """Layers, and the loss of each sample of a batch by a class attribute; training averages it."""

    def __init__(self, losses: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.losses = losses
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.words = nn.EmbeddingBag(7, 3, mode="mean")
            self.inner, self.rnn, self.head = nn.Linear(3, 4), nn.GRU(3, 4), nn.Linear(4, 1)
            self.letters = nn.Linear(3, 5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(self, batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class GraphBatch:
    """Nodes of all graphs, and whose they are."""

    def __init__(self, items: list[Any]) -> None:
        self.x = torch.cat([x for x, _ in items])
        self.batch = torch.repeat_interleave(torch.arange(len(items)), torch.tensor([len(x) for x, _ in items]))
        self.y = torch.cat([y for _, y in items])

    def to(self, device: Any, non_blocking: bool = False) -> GraphBatch:
        return self


def graph_losses(model: Any, batch: Any) -> Tensor:
    nodes = model.inner(batch.x).relu()
    pooled = torch.zeros(len(batch.y), 4).index_add(0, batch.batch, nodes)
    return (model.head(pooled).squeeze(1) - batch.y).square()


def packed(items: list[Any]) -> Any:
    items = sorted(items, key=lambda item: -len(item[0]))
    return pack_sequence([x for x, _ in items]), torch.cat([y for _, y in items])


def packed_losses(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return (model.head(model.rnn(x)[1][0]).squeeze(1) - y).square()


def detection(items: list[Any]) -> Any:
    return [x for x, _ in items], [{"box": y} for _, y in items]


def detection_losses(model: Any, batch: Any) -> Tensor:
    images, targets = batch
    found = [model.head(model.inner(x).relu().mean(0)) for x in images]
    return torch.stack([(f - t["box"]).square().sum() for f, t in zip(found, targets, strict=True)])


def bags(items: list[Any]) -> Any:
    lengths = torch.tensor([len(x) for x, _ in items])
    return torch.cat([x for x, _ in items]), lengths.cumsum(0) - lengths, torch.cat([y for _, y in items])


def bag_losses(model: Any, batch: Any) -> Tensor:
    ids, offsets, y = batch
    return (model.head(model.inner(model.words(ids, offsets)).tanh()).squeeze(1) - y).square()


def time_major(items: list[Any]) -> Any:
    return {"x": torch.stack([x[:2] for x, _ in items], dim=1), "y": torch.cat([y for _, y in items])}


def time_major_losses(model: Any, batch: Any) -> Tensor:
    return (model.head(model.rnn(batch["x"])[1][0]).squeeze(1) - batch["y"]).square()


def ctc(items: list[Any]) -> Any:
    lengths = torch.tensor([len(x) for x, _ in items])
    labels = [1 + torch.arange(max(1, len(x) // 2)) % 4 for x, _ in items]
    x = pad_sequence([x for x, _ in items], batch_first=True)
    return x, torch.cat(labels), lengths, torch.tensor([len(label) for label in labels])


def ctc_losses(model: Any, batch: Any) -> Tensor:
    x, labels, lengths, label_lengths = batch
    log_probs = model.letters(x).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_probs, labels, lengths, label_lengths, reduction="none")


def by_length(items: list[Any]) -> Any:
    items = sorted(items, key=lambda item: len(item[0]))
    mask = pad_sequence([torch.ones(len(x)) for x, _ in items], batch_first=True)
    return pad_sequence([x for x, _ in items], batch_first=True), mask, torch.cat([y for _, y in items])


def masked_losses(model: Any, batch: Any) -> Tensor:
    x, mask, y = batch
    pooled = (model.inner(x).relu() * mask.unsqueeze(2)).sum(1)
    return (model.head(pooled).squeeze(1) - y).square()


APART = {
    "graphs": (SEQUENCES, GraphBatch, graph_losses, "a GraphBatch"),
    "packed": (SEQUENCES, packed, packed_losses, "a tuple of 2"),
    "detection": (SEQUENCES, detection, detection_losses, "a tuple of 2"),
    "bags": (WORDS, bags, bag_losses, "a tuple of 3"),
    "time-major": (SEQUENCES, time_major, time_major_losses, "a dict with the keys 'x', 'y'"),
    "ctc": (SEQUENCES, ctc, ctc_losses, "a tuple of 4"),
    "sorted": (SEQUENCES, by_length, masked_losses, "a tuple of 3"),
}


def expected(model: Any, samples: list[Any], collate: Any) -> tuple[Tensor, Tensor]:
    """Loss and squared norm of its gradient, one sample after the other."""
    losses, norms = [], []
    for sample in samples:
        loss = model.losses(model, collate([sample])).mean()
        found = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
        losses.append(loss.detach())
        norms.append(sum(g.square().sum() for g in found if g is not None))
    return torch.stack(losses), torch.stack(norms)


def attributed(model: Any, samples: Any, collate: Any = None, batch_size: int = 4, **settings: Any) -> Any:
    data = Rows(samples) if isinstance(samples, list) else samples
    loader = DataLoader(data, batch_size, shuffle=True, collate_fn=collate)
    given = {"targets": "train", "method": GradDot(IdentityProjector()), **settings}
    return attribute(quiet_trainer(), model=model, train_dataloaders=loader, **given)


@pytest.mark.parametrize("name", APART)
def test_samples_apart_are_those_of_the_loop(name: str, caplog: pytest.LogCaptureFixture) -> None:
    samples, collate, losses, form = APART[name]
    model = Model(losses).eval()
    with caplog.at_level(logging.WARNING):
        result = attributed(model, samples, collate)
    loss, norms = expected(model, samples, collate)
    torch.testing.assert_close(result.loss, loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.self_influence, norms, rtol=1e-3, atol=1e-6)
    said = [record.message for record in caplog.records if "cannot be taken from a batch" in record.message]
    assert len(said) == 2 if name == "" else len(said) >= 1
    assert f"Model: samples cannot be taken from a batch of the training DataLoader, {form}" in said[0]
    assert "up to 4 times as long" in said[0]


class GraphMargins(AttributionMixin, Model):
    model_output = Regression()

    def attribution_step(self, batch: Any) -> Any:
        nodes = self.inner(batch.x).relu()
        pooled = torch.zeros(len(batch.y), 4).index_add(0, batch.batch, nodes)
        return self.head(pooled).squeeze(1), batch.y


@pytest.mark.parametrize("method", ["stored", "exact"])
def test_graphs_with_the_mixin_and_targets_of_their_own(method: str) -> None:
    model = GraphMargins(graph_losses).eval()
    targets = DataLoader(Rows(SEQUENCES[3:6]), 2, collate_fn=GraphBatch)
    chosen = GradDot(IdentityProjector()) if method == "stored" else GradDot(exact=True)
    result = attributed(model, SEQUENCES, GraphBatch, targets="auto", target_dataloaders=targets, method=chosen)
    names = list(model.parameters())

    def rows(value: Callable[[Any], Tensor]) -> Tensor:
        found = [torch.autograd.grad(value(GraphBatch([s])).sum(), names, allow_unused=True) for s in SEQUENCES]
        return torch.stack([
            torch.cat([(g if g is not None else 0 * p).flatten() for g, p in zip(f, names, strict=True)]) for f in found
        ])

    outputs = rows(lambda batch: model.model_output.output(*model.attribution_step(batch)))
    losses = rows(lambda batch: model.model_output.loss(*model.attribution_step(batch)))
    torch.testing.assert_close(result.scores.values, -losses @ outputs[3:6].T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", [RepresentationSimilarity(), Influence("empirical_fisher")])
def test_methods_on_whole_batches_say_that_samples_are_apart(method: Any) -> None:
    with pytest.raises(AttributionError, match=r"Samples of GraphMargins cannot be taken from a batch.*Take one"):
        attributed(GraphMargins(graph_losses), SEQUENCES, GraphBatch, method=method)


# What is refused ------------------------------------------------------------------------------------------------------

PLAIN = [(x[0], y) for x, y in SEQUENCES]


def plain_losses(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return (model.head(model.inner(x).tanh()) - y).square().mean(1)


def test_rows_that_the_collate_function_drops_are_named_before_anything_is_featurized() -> None:
    def readable(items: list[Any]) -> Any:
        return default_collate([item for item in items if item is not None])

    broken = [None if i == 6 else sample for i, sample in enumerate(PLAIN)]
    message = r"\(.*readable\) returned 7 samples for the 8 rows \[.*\]: dataset\[6\] is None.*Subset"
    with pytest.raises(BatchRowsError, match=message):
        attributed(Model(plain_losses), broken, readable)


def test_rows_that_are_dropped_later_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lively(items: list[Any]) -> Any:
        return default_collate([item for item in items if item[1] > -5])

    samples = [(x, 0 * y - 9 if i == 7 else y) for i, (x, y) in enumerate(PLAIN)]
    monkeypatch.setattr("lightning_attr.verification.probe.probe_rows", lambda source: [0, 1, 2, 3])
    with pytest.raises(
        BatchRowsError, match=r"returned 3 samples for the 4 rows \[4, 5, 6, 7\]: dataset\[7\] left out"
    ):
        attributed(Model(plain_losses), samples, lively)


def test_a_hook_that_drops_rows_is_named() -> None:
    class Halving(Model):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [part[: len(part) // 2] for part in batch]

    with pytest.raises(BatchRowsError, match=r"or `on_after_batch_transfer` of Halving, returned"):
        attributed(Halving(plain_losses), PLAIN)


def mixed(items: list[Any]) -> Any:
    x, y = default_collate(items)
    return (x + x.roll(1, 0)) / 2, (y + y.roll(1, 0)) / 2


def test_samples_that_are_mixed_are_refused() -> None:
    with pytest.raises(BatchDependenceError, match=r"Batches are not made of their samples: .*\(mixed\).*mixup"):
        attributed(Model(plain_losses), PLAIN, mixed)


def test_a_random_hook_is_named() -> None:
    class Noisy(Model):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + torch.randn_like(batch[0]), batch[1]]

    with pytest.raises(BatchDependenceError, match=r"on_after_batch_transfer` of Noisy\) give other values each time"):
        attributed(Noisy(plain_losses), PLAIN)


def test_a_mean_over_all_nodes_is_refused_with_the_lines_to_write() -> None:
    class PerNode(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.head(self.inner(batch.x)).squeeze(1) - batch.y[batch.batch]).square().mean()

    message = r"means over all nodes(.|\n)*class AttributedPerNode\(AttributionMixin, PerNode\)(.|\n)*here a GraphBatch"
    with pytest.raises(BatchDependenceError, match=message):
        attributed(PerNode(graph_losses), SEQUENCES, GraphBatch)


# What is right without being apart ------------------------------------------------------------------------------------


def test_padding_that_the_module_masks_is_no_reason_to_go_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    def padded(items: list[Any]) -> Any:
        mask = pad_sequence([torch.ones(len(x)) for x, _ in items], batch_first=True)
        return pad_sequence([x for x, _ in items], batch_first=True), mask, torch.cat([y for _, y in items])

    model = Model(masked_losses).eval()
    result = attributed(model, SEQUENCES, padded)
    torch.testing.assert_close(result.self_influence, expected(model, SEQUENCES, padded)[1], rtol=1e-3, atol=1e-6)
    assert "cannot be taken" not in caplog.text


@pytest.mark.parametrize("batch_size", [3, 4, 8])
def test_what_samples_share_may_be_as_long_as_the_batch(batch_size: int) -> None:
    scale, names = torch.linspace(0.2, 2.0, batch_size), [f"feature {i}" for i in range(batch_size)]
    samples = [(torch.randn(2, batch_size, generator=G), torch.randn((), generator=G)) for _ in range(9)]

    def collate(items: list[Any]) -> Any:
        return {**dict(zip("xy", default_collate(items), strict=True)), "scale": scale, "names": names}

    class Scaled(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(batch_size, 1)

        def losses(self, _: Any, batch: Any) -> Tensor:
            assert len(batch["names"]) == len(batch["scale"]) == batch_size
            return (self.head(batch["x"] * batch["scale"]).sum((1, 2)) - batch["y"]).square()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.losses(self, batch).mean()

    model = Scaled()
    result = attributed(model, samples, collate, batch_size)
    torch.testing.assert_close(result.self_influence, expected(model, samples, collate)[1], rtol=1e-3, atol=1e-5)


def test_a_loss_in_float64_of_a_float32_module_is_judged_by_float32() -> None:
    class Double(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return (self.head(self.inner(x).tanh()).double() - y.double()).square().mean()

    model = Double(plain_losses).eval()
    samples = [(1e3 * x, y) for x, y in PLAIN]
    torch.testing.assert_close(
        attributed(model, samples).self_influence, expected(model, samples, default_collate)[1], rtol=1e-3, atol=1e-5
    )


def test_one_value_of_a_column_has_a_digest() -> None:
    table = torch.randn(8, 4)
    samples = [(table[i, :3], table[i : i + 1, 3]) for i in range(8)]
    assert DataSource.of(loader_of(Rows(samples)), "training").digest() is not None


# Which samples stand for the data set ---------------------------------------------------------------------------------


def test_probed_samples_are_spread_and_unlike_each_other() -> None:
    y = torch.arange(200) // 50
    samples: list[Any] = [(torch.zeros(3 + (i == 77) - (i == 120)), int(y[i])) for i in range(200)]
    samples[150] = (torch.full((3,), float("nan")), 3)
    rows = probe_rows(DataSource.of(DataLoader(Rows(samples)), "training"))
    assert len(rows) == 8
    assert {77, 120, 150} <= {*rows[:3]}
    assert {int(y[row]) for row in rows} == {0, 1, 2, 3}
    assert rows == probe_rows(DataSource.of(DataLoader(Rows(samples), 7), "training"))


def test_reading_for_the_probe_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_attr.verification.probe_rows._SECONDS", 0.0)
    read = Mock()  # a list would be put back

    class Slow(Rows):
        def __getitem__(self, index: int) -> Any:
            read(index)
            return self.samples[index]

    assert len(probe_rows(DataSource.of(DataLoader(Slow(PLAIN * 20)), "training"))) == 8
    assert read.call_count == 8


@pytest.mark.parametrize("size", [40, 3000])
def test_the_first_sample_without_a_label_is_among_the_probes(size: int) -> None:
    x, y = torch.randn(size, 2), torch.zeros(size, dtype=torch.int64)
    y[[size - 7, size // 2 + 1, size - 2]] = -100
    rows = probe_rows(DataSource.of(DataLoader(TensorDataset(x, y)), "training"))
    assert size // 2 + 1 in rows[:4]
    subset = Subset(TensorDataset(x, y), list(range(size))[::-1])
    assert 1 in probe_rows(DataSource.of(DataLoader(subset), "training"))[:4]


class Labelled(Rows):
    def __init__(self, samples: Any, targets: Any) -> None:
        super().__init__(samples)
        self.targets = targets


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_labels_beside_the_samples_are_looked_through(kind: Any) -> None:
    targets = [0, 1, 2, -1, 2, -1]
    assert without_label(Labelled(PLAIN[:6], kind(targets))) == [3]
    assert without_label(Labelled(PLAIN[:6], kind(targets[:3]))) == []
    assert without_label(Labelled(PLAIN[:6], None)) == []


# Losses whose batches differ from those that were checked -------------------------------------------------------------


class MaskedMean(Model):
    """A mean over the labels that are there; of batches in which all are there, it is the mean of the samples'."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        there = y.isfinite()
        return ((self.head(x) - y.nan_to_num()).square() * there).sum() / there.sum()

    def __init__(self) -> None:
        super().__init__(plain_losses)
        self.head = nn.Linear(3, 4)


@pytest.mark.parametrize("probed", ["spread", "first"])
def test_means_over_the_labels_that_are_there_are_refused(probed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(16, 3, generator=G), torch.randn(16, 4, generator=G)
    y[13:, 1:] = float("nan")
    if probed == "first":  # later batches are compared as well
        monkeypatch.setattr("lightning_attr.verification.probe.probe_rows", lambda source: [0, 1, 2, 3])
    with pytest.raises(BatchDependenceError, match="neither the mean nor the sum of one term a sample"):
        attributed(MaskedMean(), TensorDataset(x, y))
