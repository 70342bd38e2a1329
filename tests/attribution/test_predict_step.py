"""The predict run: which rows go where, what the store already holds, and what a batch may be."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from cases import BlobClassifier, Tally, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin, FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.features.transfer import to_device
from lightning_attr.files.io import digest, read_tensors
from lightning_attr.methods import TRAK, GradDot, ModelMethod, ScoreBlock, model_of
from lightning_attr.outputs import BinaryMargin, NegativeLoss, Regression
from lightning_attr.projectors import IdentityProjector, KroneckerProjector

# The shared module has a validation step; not every test validates.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

METHOD = TRAK(projector=KroneckerProjector(16))  # learns nothing: calls are counted, bits compared
TRAIN, TARGETS = blobs(20), blobs(7, seed=1)


def attributed(model: Any = None, train: Any = None, targets: Any = None, trainer: Any = None, **settings: Any) -> Any:
    return attribute(
        trainer or quiet_trainer(),
        model=model or BlobClassifier(),
        train_dataloaders=train or loader_of(TRAIN),
        target_dataloaders=targets or loader_of(TARGETS),
        **{"method": METHOD, **settings},
    )


def fitted(**settings: Any) -> Any:
    callback = AttributionCallback("run", method=METHOD, log=False, **settings)
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback])
    trainer.fit(BlobClassifier(), loader_of(TRAIN, shuffle=True))
    return trainer


def forwards(model: Any) -> list[int]:
    """Notes the number of samples of every forward."""
    sizes: list[int] = []
    model.network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return sizes


# The reference ------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_a_loop_over_samples() -> None:
    """TRAK's closed form with explicit gradients, a sample at a time, in float64."""
    model = BlobClassifier().double()

    def gradients(data: TensorDataset) -> tuple[Tensor, Tensor]:
        rows, pushes = [], []
        for x, y in data:
            logits = model(x.double())
            probability = logits.softmax(0)[y]
            output = torch.log(probability / (1 - probability))
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(output, list(model.parameters()))]))
            pushes.append(1 - probability.detach())
        return torch.stack(rows), torch.stack(pushes)

    phi, q = gradients(TRAIN)
    psi, _ = gradients(TARGETS)
    kernel = phi.T @ torch.diag(q * (1 - q)) @ phi
    kernel += 0.5 * kernel.diagonal().mean() * torch.eye(len(kernel))
    inverse = torch.linalg.inv(kernel)
    method = TRAK(projector=IdentityProjector(), damping=0.5, kernel="margin")
    result = attributed(model, trainer=quiet_trainer(precision="64-true"), method=method)
    expected = torch.diag(q) @ phi @ inverse @ psi.T
    torch.testing.assert_close(result.scores.values.double(), expected, rtol=1e-4, atol=1e-5)
    own = q * torch.einsum("nk,kl,nl->n", phi, inverse, phi)
    torch.testing.assert_close(result.self_influence.double(), own, rtol=1e-4, atol=1e-5)


# Rows and columns ---------------------------------------------------------------------------------------------------


def shuffled(data: Any) -> DataLoader[Any]:
    return loader_of(data, shuffle=True)


def dropping(data: Any) -> DataLoader[Any]:
    return loader_of(data, shuffle=True, drop_last=True)


def repeating(data: Any) -> DataLoader[Any]:
    return loader_of(data, sampler=WeightedRandomSampler(torch.rand(len(data)).tolist(), 50))


def batched(data: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 8, drop_last=True))


def with_workers(data: Any) -> DataLoader[Any]:
    return loader_of(data, shuffle=True, num_workers=1)


@pytest.mark.parametrize("kind", [shuffled, dropping, repeating, batched, with_workers])
def test_row_i_is_dataset_i_and_column_j_target_j(kind: Any) -> None:
    plain, other = attributed(), attributed(train=kind(TRAIN), targets=kind(TARGETS))
    assert torch.equal(other.scores.values, plain.scores.values)
    assert torch.equal(other.self_influence, plain.self_influence)
    assert torch.equal(other.labels, TRAIN.tensors[1])
    torch.testing.assert_close(
        other.loss, F.cross_entropy(BlobClassifier()(TRAIN.tensors[0]), TRAIN.tensors[1], reduction="none")
    )


def test_targets_of_training_data_are_its_own_rows() -> None:
    result = attribute(quiet_trainer(), model=BlobClassifier(), train_dataloaders=shuffled(TRAIN), method=METHOD)
    # The store rounds training features to float16, and targets are in no store.
    torch.testing.assert_close(result.scores.values.diagonal(), result.self_influence, rtol=2e-3, atol=1e-5)


# The store ----------------------------------------------------------------------------------------------------------


def test_features_in_the_store_are_used() -> None:
    trainer = fitted()
    sizes = forwards(trainer.lightning_module)
    attributed(trainer.lightning_module, trainer=trainer)
    snapshots = len(FeatureStore.open("run").snapshots)
    probes = [size for size in sizes if size not in (8, 7)]
    assert max(probes) == 4  # the check on a few samples
    assert (
        sizes[-2 * snapshots :] == [4, 7] * snapshots
    )  # losses of four samples beside those on record, and the targets


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_missing_features_are_computed(damage: str) -> None:
    trainer = fitted()
    first = attributed(trainer.lightning_module, trainer=trainer)
    store = FeatureStore.open("run")
    path = Path("run").absolute() / store.snapshots[1].folder / "features" / "00000.safetensors"
    content = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(content[:-9])
    assert store.repair() == [path]
    sizes = forwards(trainer.lightning_module)
    again = attributed(trainer.lightning_module, trainer=trainer)
    assert torch.equal(again.scores.values, first.scores.values)
    # Snapshot 1 of 0, 1, 2: 20 training samples, of which 4 once more, compared with autograd. At the others, losses
    # of 4 samples beside those on record.
    # Second directions share the forward pass.
    assert sizes[-9:] == [4, 7, 8, 4, 8, 4, 7, 4, 7]
    assert path.read_bytes() == content


def test_snapshots_without_features_are_featurized_once() -> None:
    trainer = fitted(featurize=False)
    assert FeatureStore.open("run").fingerprint.projector is None
    first = attributed(trainer.lightning_module, trainer=trainer)
    sizes = forwards(trainer.lightning_module)
    second = attributed(trainer.lightning_module, trainer=trainer)
    assert 8 not in sizes
    assert torch.equal(first.scores.values, second.scores.values)
    assert FeatureStore.open("run").fingerprint.projector == METHOD.projector.config


def test_features_of_the_callback_and_of_attribute_are_the_same_bits() -> None:
    files = []
    for featurize in (True, False):
        torch.manual_seed(4)
        trainer = fitted(featurize=featurize)
        attributed(trainer.lightning_module, trainer=trainer)
        shards = Path("run").rglob("features/*.safetensors")
        files.append({p.relative_to("run"): digest(read_tensors(p)) for p in shards})  # headers differ: another store
        Path("run").rename(f"run-{featurize}")
    assert len(files[0]) == 3
    assert files[0] == files[1]


def test_result_does_not_depend_on_the_temporary_files_that_are_gone() -> None:
    result = attributed()
    result.save("saved")
    assert torch.equal(type(result).load("saved").scores.values, result.scores.values)
    assert result.metrics["share_helpful"] > 0


SCRIPT = """
import sys, torch
from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.projectors import KroneckerProjector
from lightning_attr.methods import TRAK, GradDot, ModelMethod, ScoreBlock, model_of
result = quiet_trainer().attribute(
    model=BlobClassifier(seed=7), store=sys.argv[1], method=TRAK(projector=KroneckerProjector(16)),
    train_dataloaders=loader_of(blobs(20)), target_dataloaders=loader_of(blobs(7, seed=1)),
)
torch.save(result.scores.values, sys.argv[2])
"""


@pytest.mark.slow
def test_store_from_another_process(tmp_path: Path) -> None:
    trainer = fitted()
    expected = attributed(trainer.lightning_module, trainer=trainer).scores.values
    paths = [str(tmp_path / "run"), str(tmp_path / "scores.pt")]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *paths],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert torch.equal(torch.load(paths[1]), expected)


# Transfer hooks -----------------------------------------------------------------------------------------------------

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


APPLIED = Tally()


class Doubling:
    """Each of the three hooks doubles the inputs, and is counted."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._double("on_before_batch_transfer", batch)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return self._double("transfer_batch_to_device", [tensor.to(device) for tensor in batch])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._double("on_after_batch_transfer", batch)

    def _double(self, hook: str, batch: Any) -> Any:
        APPLIED.append((type(self).__name__, hook))
        assert self.trainer.predicting
        x, y = batch
        return [2 * x, y]


class DoublingModule(Doubling, BlobClassifier):
    pass


class DoublingData(Doubling, L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader_of(TRAIN)

    def predict_dataloader(self) -> Any:
        return loader_of(TARGETS)


@pytest.mark.parametrize("owner", ["module", "datamodule", "both"])
def test_transfer_hooks_are_applied_once_a_batch(owner: str) -> None:
    by_hand = [TensorDataset(8 * data.tensors[0], data.tensors[1]) for data in (TRAIN, TARGETS)]
    expected = attributed(None, *map(loader_of, by_hand))
    model = BlobClassifier() if owner == "datamodule" else DoublingModule()
    data = None if owner == "module" else DoublingData()
    loaders = {"train_dataloaders": loader_of(TRAIN), "target_dataloaders": loader_of(TARGETS)} if data is None else {}
    APPLIED.clear()
    result = attribute(quiet_trainer(), data, model=model, method=METHOD, **loaders)
    assert torch.equal(result.scores.values, expected.scores.values)
    counts = Counter(APPLIED)
    assert len({*counts.values()}) == 1  # each hook as often as the others
    assert counts.keys() == {("DoublingModule" if data is None else "DoublingData", hook) for hook in HOOKS}


def test_to_device_takes_each_hook_from_its_owner() -> None:
    class Partial(L.LightningDataModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return ("datamodule", batch)

    class Module(BlobClassifier):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return ("module", batch)

    moved = to_device(torch.ones(1), Module(), Partial(), torch.device("cpu"))
    assert moved == ("datamodule", ("module", torch.ones(1)))


# Batches ------------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    x: Tensor
    y: Tensor
    name: Any


def collate(form: Any) -> Any:
    def collate_fn(items: Any) -> Any:
        x, y = default_collate(items)
        return form(x, y, [f"sample {i}" for i in range(len(y))])

    return collate_fn


FORMS = {
    "tuple": (lambda x, y, name: (x, y), lambda batch: (batch[0], batch[1])),
    "list with strings": (lambda x, y, name: [x, y, name], lambda batch: (batch[0], batch[1])),
    "dict with strings": (lambda x, y, name: {"x": x, "y": y, "name": name}, lambda batch: (batch["x"], batch["y"])),
    "dataclass": (lambda x, y, name: Sample(x, y, name), lambda batch: (batch.x, batch.y)),
    "nested": (
        lambda x, y, name: {"in": [x, (name,)], "out": {"y": y}},
        lambda batch: (batch["in"][0], batch["out"]["y"]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_structure(form: str) -> None:
    build, read = FORMS[form]

    class Reads(BlobClassifier):
        def attribution_step(self, batch: Any) -> Any:
            x, y = read(batch)
            return self(x), y

    loaders = [loader_of(data, collate_fn=collate(build)) for data in (TRAIN, TARGETS)]
    assert torch.equal(attributed(Reads(), *loaders).scores.values, attributed().scores.values)


def test_batch_that_is_no_pair_needs_an_attribution_step() -> None:
    build, _ = FORMS["dict with strings"]
    loader = loader_of(TRAIN, collate_fn=collate(build))
    with pytest.raises(
        TypeError, match=r"Expected a batch \(x, y\), but got a dict with the keys \['name', 'x', 'y'\]"
    ):
        attributed(train=loader)


class Padded(AttributionMixin, L.LightningModule):
    """Scores sequences of unequal length; padding is 0 and does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, padding_idx=0)
        self.head = nn.Linear(4, 6)
        self.model_output = NegativeLoss(self.sequence_loss)

    @staticmethod
    def sequence_loss(logits: Tensor, tokens: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none", ignore_index=0)
        return losses.sum(1) / (tokens != 0).sum(1)

    def attribution_step(self, batch: Any) -> Any:
        tokens = batch["tokens"]
        return self.head(self.embedding(tokens[:, :-1])), tokens[:, 1:]


def pad(items: Any) -> Any:
    return {"tokens": nn.utils.rnn.pad_sequence(list(items), batch_first=True)}


def test_padded_sequences_do_not_depend_on_their_neighbours() -> None:
    sequences = [torch.randint(1, 6, (int(length),)) for length in torch.randint(2, 9, (17,))]
    torch.manual_seed(0)
    model = Padded().double()
    found = [
        attributed(
            model,
            loader_of(sequences, batch_size, collate_fn=pad),
            loader_of(sequences[:5], batch_size, collate_fn=pad),
            trainer=quiet_trainer(precision="64-true"),
        ).scores.values
        for batch_size in (1, 5, 17)
    ]
    for scores in found[1:]:
        torch.testing.assert_close(scores, found[0], rtol=1e-5, atol=1e-6)


class OneOutput(AttributionMixin, L.LightningModule):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.model_output = output
        self.layer = nn.Linear(4, 1)

    def attribution_step(self, batch: Any) -> Any:
        return self.layer(batch[0]).squeeze(1), batch[1]


@pytest.mark.parametrize("output", [Regression(), BinaryMargin()])
def test_regression_and_binary_outputs(output: Any) -> None:
    y = TRAIN.tensors[1].float() if isinstance(output, Regression) else TRAIN.tensors[1].clamp(max=1)
    data = TensorDataset(TRAIN.tensors[0], y)
    torch.manual_seed(0)
    model = OneOutput(output)
    result = attribute(quiet_trainer(), model=model, train_dataloaders=loader_of(data), method=METHOD)
    torch.testing.assert_close(result.loss, output.loss(model.layer(data.tensors[0]).squeeze(1), y).detach())
    assert (result.labels is None) == isinstance(output, Regression)
    # A sample and the gradient of its own output: the sign is that of the push.
    push = output.out_to_loss(model.layer(data.tensors[0]).squeeze(1), y)
    assert torch.equal(result.self_influence.sign(), push.sign())


# A function of the targets ------------------------------------------------------------------------------------------


def logit_of_class_one(module: Any, batch: Any) -> Tensor:
    return module(batch[0])[:, 1]


def test_any_function_of_the_targets_is_attributed() -> None:
    model = BlobClassifier()
    result = attributed(model, method=GradDot(IdentityProjector()), target_function=logit_of_class_one)
    plain = attributed(model, method=GradDot(IdentityProjector()))
    for j, (x, _) in enumerate(TARGETS):
        gradient = torch.autograd.grad(model(x)[1], list(model.parameters()))
        for i, (x_train, y_train) in enumerate(TRAIN):
            loss = F.cross_entropy(model(x_train), y_train)
            push = torch.autograd.grad(loss, list(model.parameters()))
            expected = -sum((a * b).sum() for a, b in zip(gradient, push, strict=True))
            assert result.scores.values[i, j].item() == pytest.approx(expected.item(), rel=2e-3, abs=2e-3)
    torch.testing.assert_close(result.self_influence, plain.self_influence)
    assert result.scores.provenance["target_function"] == "logit_of_class_one"
    assert "target_function" not in plain.scores.provenance


def test_a_function_of_the_targets_through_parameters_without_a_rule() -> None:
    class Scaled(BlobClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain.expand(1)[0]

    model = Scaled()
    result = attributed(model, method=GradDot(IdentityProjector()), target_function=logit_of_class_one)
    gradient = torch.autograd.grad(model(TARGETS[0][0])[1], list(model.parameters()))
    push = torch.autograd.grad(F.cross_entropy(model(TRAIN[0][0]), TRAIN[0][1]), list(model.parameters()))
    expected = -sum((a * b).sum() for a, b in zip(gradient, push, strict=True))
    assert result.scores.values[0, 0].item() == pytest.approx(expected.item(), rel=2e-3)


def test_a_function_of_the_targets_gives_one_value_each() -> None:
    with pytest.raises(
        ValueError, match=r"`target_function` to return one value a target, of shape \(4,\), but got \("
    ):
        attributed(target_function=lambda module, batch: module(batch[0]))
    with pytest.raises(ValueError, match=r"of shape \(4,\), but got float"):
        attributed(target_function=lambda module, batch: 1.0)


@pytest.mark.parametrize("method", [GradDot(IdentityProjector()), GradDot(exact=True)])
def test_a_function_of_the_targets_has_a_gradient(method: Any) -> None:
    with pytest.raises(ValueError, match=r"`target_function` to be differentiable .* no gradient.*`detach\(\)`"):
        attributed(method=method, target_function=lambda module, batch: module(batch[0])[:, 0].detach())


def test_a_method_that_runs_the_module_needs_no_features() -> None:
    class Inputs(ModelMethod):
        def score_snapshot(self, snapshot: Any) -> Any:
            for rows, (x, _) in model_of(snapshot).train_batches():
                scores = x @ torch.cat([x for _, (x, _) in snapshot.model.target_batches(snapshot.target_rows)]).T
                yield ScoreBlock(range(rows[0], rows[-1] + 1), scores, x.square().sum(1))

    trainer = quiet_trainer()
    result = attributed(method=Inputs(), store="run", trainer=trainer)
    torch.testing.assert_close(result.scores.values, TRAIN.tensors[0] @ TARGETS.tensors[0].T)
    assert FeatureStore.open("run").fingerprint.projector is None
    assert FeatureStore.open("run").missing("current")
    expected = attributed(store="run")  # which finds the store's features missing, and adds them
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(result.labels, expected.labels)
    assert not FeatureStore.open("run").missing("current")


def test_a_callback_with_such_a_method_keeps_snapshots_only() -> None:
    class Constant(ModelMethod):
        def score_snapshot(self, snapshot: Any) -> Any:
            for rows, _ in model_of(snapshot).train_batches():
                ones = torch.ones(len(rows), len(snapshot.target_rows))
                yield ScoreBlock(range(rows[0], rows[-1] + 1), ones, ones[:, 0])

    callback = AttributionCallback("run", method=Constant())
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(BlobClassifier(), loader_of(TRAIN, shuffle=True))
    assert len(FeatureStore.open("run").snapshots) == 2
    assert not list(Path("run").rglob("features"))
    result = trainer.attribute(target_dataloaders=loader_of(TARGETS))
    assert (result.scores.values == 1).all()
