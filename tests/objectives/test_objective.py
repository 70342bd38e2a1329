"""Modules without the mixin: their training loss, taken apart into that of each sample, or refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from cases import blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin, AttributionTrainer, FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import BatchDependenceError, NonFiniteGradientError
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.methods import TRAK, GradDot
from lightning_attr.objectives.objective import MixinOutput, TrainingLoss, batch_objective, check_module
from lightning_attr.outputs import NegativeLoss
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector

B = 9
LossOf = Callable[["Plain", Any], Tensor]


class Plain(L.LightningModule):
    """Nothing of ours; ``loss_of(module, batch)`` is what its training step returns."""

    def __init__(self, loss_of: LossOf, scale: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.network = nn.Sequential(
                nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(True), nn.Dropout(), nn.Flatten(), nn.Linear(12, 3)
            )
            self.scale = nn.Parameter(torch.tensor(1.5)) if scale else None
        self.loss_of = loss_of

    def forward(self, x: Tensor) -> Tensor:
        out = self.network(x)
        return out if self.scale is None else torch.kron(out, self.scale)  # of which no rule is known

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss_of(self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def data(n: int = B, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, 5, generator=generator).to(dtype), torch.randint(3, (n,), generator=generator)


def tokens(n: int = B) -> tuple[Tensor, Tensor]:
    return data(n)[0], torch.arange(3 * n).view(n, 3) % 2


def plain(loss_of: LossOf, **arguments: bool) -> Plain:
    return Plain(loss_of, **arguments).double().eval()


def featurizer(module: Any, batch: Any, size: int = 4) -> Featurizer:
    probe = tuple(tensor[:size] for tensor in batch) if isinstance(batch, tuple) else first(batch, size)
    return Featurizer(module, plan(module, probe, size), IdentityProjector().bind(ParameterLayout.of(module), "final"))


def first(batch: dict[str, Any], size: int) -> dict[str, Any]:
    return {name: value[:size] for name, value in batch.items()}


def check_against_the_loop(module: Any, batch: Any, n: int = B) -> Featurizer:
    """Features and values against one backward pass a sample, for the whole batch and for parts of it."""
    featurize = featurizer(module, batch)
    params = [p for p in module.parameters() if p.requires_grad]
    for rows in ([0], [1, 2], list(range(n))):
        part = {k: v[rows] for k, v in batch.items()} if isinstance(batch, dict) else tuple(t[rows] for t in batch)
        columns = featurize(part, rows)
        assert list(columns) == ["features", "output", "loss", "out_to_loss", "newton_weight"]
        for i, row in enumerate(rows):
            one = {k: v[[row]] for k, v in batch.items()} if isinstance(batch, dict) else [t[[row]] for t in batch]
            returned = module.training_step(one, 0)
            loss = returned["loss"] if isinstance(returned, dict) else returned
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, materialize_grads=True)])
            torch.testing.assert_close(columns["features"][i], -gradient, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(columns["loss"][i], loss.detach().reshape(()), rtol=1e-10, atol=1e-12)
        assert torch.equal(columns["output"], -columns["loss"])
        assert columns["out_to_loss"].eq(1).all()
        assert columns["newton_weight"].eq(1).all()
        assert not any(values.requires_grad for values in columns.values())
    return featurize


def cross_entropy(module: Plain, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def squares(module: Plain, batch: Any) -> Tensor:
    return (module(batch[0]) - batch[1][:, None]) ** 2


# What the step returns, and how it was made of the samples.
CAPTURED: dict[str, tuple[str, LossOf]] = {
    "cross entropy": ("mean", cross_entropy),
    "a loss module": ("mean", lambda m, b: nn.CrossEntropyLoss(label_smoothing=0.1)(m(b[0]), b[1])),
    "summed cross entropy": ("sum", lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum")),
    "no reduction, then a mean": ("mean", lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none").mean()),
    "squared error": ("mean", lambda m, b: F.mse_loss(m(b[0]), b[0][:, 0, :3])),
    "mean by hand": ("mean", lambda m, b: torch.mean(squares(m, b))),
    "mean of sums": ("mean", lambda m, b: squares(m, b).sum(1).mean(dim=0)),
    "sum by hand": ("sum", lambda m, b: squares(m, b).sum()),
    "sum over the length": ("mean", lambda m, b: squares(m, b).sum() / len(b[0])),
    "batch mean": ("mean", lambda m, b: F.kl_div(m(b[0]).log_softmax(1), b[0][:, 0, :3].exp(), reduction="batchmean")),
    "two terms": ("mean", lambda m, b: cross_entropy(m, b) + 0.3 * squares(m, b).mean()),
    "a mean and a sum": ("mean", lambda m, b: cross_entropy(m, b) / 2 + squares(m, b).sum() / len(b[0])),
    "flattened": (
        "mean",
        lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]).flatten(), b[0][:, 0, :3].gt(0).double().flatten()),
    ),
    "linear in the end": ("mean", lambda m, b: squares(m, b).mean(1).sum().div(len(b[0])).square().sqrt()),
    "in a dict": ("mean", lambda m, b: {"loss": cross_entropy(m, b), "outputs": b[0]}),  # type: ignore[dict-item]
    "of shape (1,)": ("mean", lambda m, b: F.cross_entropy(m(b[0]), b[1]).reshape(1)),
    "a mean that is not the loss": ("mean", lambda m, b: (m(b[0]).abs().mean(), cross_entropy(m, b))[1]),
    "read and logged": ("mean", lambda m, b: (cross_entropy(m, b).item(), cross_entropy(m, b))[1]),
}
# The values of these cannot be captured: each sample runs on its own.
APART: dict[str, tuple[str, LossOf]] = {
    "without a reduction": ("mean", lambda m, b: torch.einsum("bi->", squares(m, b)) / len(b[0])),
    "summed in python": ("sum", lambda m, b: sum(squares(m, b).flatten().unbind())),  # type: ignore[arg-type,return-value]
    "weight decay in the loss": (
        "mean",
        lambda m, b: cross_entropy(m, b) + 0.1 * m.network[0].weight.square().sum(),
    ),
    "as many terms as samples": (
        "mean",
        lambda m, b: torch.stack([cross_entropy(m, b), *(k * squares(m, b).mean() for k in range(3))]).mean(),
    ),
    "samples in the second dimension": ("mean", lambda m, b: squares(m, b).t().flatten().mean()),
}


@pytest.mark.parametrize("scale", [False, True], ids=["hooks", "fallback"])
@pytest.mark.parametrize("name", [*CAPTURED, *APART])
def test_features_and_values_are_those_of_the_loss_of_each_sample(
    name: str, scale: bool, caplog: pytest.LogCaptureFixture
) -> None:
    reduction, loss_of = {**CAPTURED, **APART}[name]
    featurize = check_against_the_loop(plain(loss_of, scale=scale), data())
    assert featurize.plan.objective == TrainingLoss(None, reduction, name in CAPTURED)
    told = "Plain: the terms of its training loss cannot be seen from outside" in caplog.text
    assert told == (name in APART)


def test_parameters_of_no_layer_at_all() -> None:
    """Where nothing is hooked, the batch's own loss has no graph."""

    class Scaled(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor([0.5, 2.0]).double())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.kron(batch[0][:, :, 0], self.slope[None]).square().mean() + 0.5 * batch[0].mean()

    assert check_against_the_loop(Scaled(), data()).plan.fallback == ("slope",)


def test_dict_batches_with_strings_and_sequences_of_one_length() -> None:
    def loss_of(module: Plain, batch: dict[str, Any]) -> Tensor:
        assert len(batch["name"]) == len(batch["x"])
        logits = module(batch["x"])[:, :, None] * torch.tensor([[1.0, -1.0]]).double()  # (b, 3 tokens, 2 classes)
        return F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten())

    x, y = tokens()
    check_against_the_loop(plain(loss_of), {"x": x, "y": y, "name": Names("abcdefghi")})


class Names(list):  # type: ignore[type-arg]
    """A list that also takes a list of positions."""

    def __getitem__(self, key: Any) -> Any:
        return Names(list.__getitem__(self, i) for i in key) if isinstance(key, list) else list.__getitem__(self, key)


class OnlyBatch(Plain):
    def training_step(self, batch: Any) -> Tensor:
        return self.loss_of(self, batch)


class AnyArguments(Plain):
    def training_step(self, *args: Any) -> Tensor:
        batch, batch_idx = args
        assert batch_idx == 0
        return self.loss_of(self, batch)


@pytest.mark.parametrize("kind", [OnlyBatch, AnyArguments])
def test_signatures(kind: type[Plain]) -> None:
    x, y = data()
    columns = featurizer(kind(cross_entropy).double().eval(), (x, y))((x, y), range(B))
    expected = featurizer(plain(cross_entropy), (x, y))((x, y), range(B))
    assert all(torch.equal(values, expected[name]) for name, values in columns.items())


def test_one_sample_alone() -> None:
    module, (x, y) = plain(cross_entropy), data(1)
    featurize = featurizer(module, (x, y), 1)
    assert featurize.plan.objective == TrainingLoss(None, "mean", captured=False)
    columns = featurize((x, y), [0])
    torch.testing.assert_close(columns["loss"], cross_entropy(module, (x, y)).detach().reshape(1))


def test_a_mixin_is_preferred() -> None:
    class Both(AttributionMixin, Plain):
        pass

    x, y = data(4)
    assert batch_objective(Both(cross_entropy).double().eval(), (x, y), 4) == MixinOutput(None)


def test_the_loss_in_low_precision() -> None:
    module, (x, y) = plain(cross_entropy).float(), data(dtype=torch.float32)
    featurize = featurizer(module, (x, y))
    exact = featurize((x, y), range(B))
    with torch.autocast("cpu", torch.bfloat16):
        rough = featurize((x, y), range(B))
    torch.testing.assert_close(rough["loss"], exact["loss"], rtol=0.05, atol=0.05)
    assert F.cosine_similarity(rough["features"], exact["features"]).min() > 0.99
    half = plain(lambda m, b: torch.einsum("bi->", m(b[0]).float().square()) / len(b[0])).bfloat16()
    assert featurizer(half, (x.bfloat16(), y)).plan.objective == TrainingLoss(None, "mean", captured=False)


class Uncertain(Plain):
    """Learns the weights of its terms, as multi-task models do."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(cross_entropy)
        self.log_variance = nn.Parameter(torch.full((2, *shape), 0.3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = cross_entropy(self, batch), squares(self, batch).mean()
        weight = self.log_variance.neg().exp()
        return first * weight[0] + second * weight[1] + self.log_variance.sum()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_learned_weights_of_terms(shape: tuple[int, ...]) -> None:
    check_against_the_loop(Uncertain(shape).double().eval(), data())


# Refused --------------------------------------------------------------------------------------------------------


def weighted(module: Plain, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 5.0]).double())


def padded(module: Plain, batch: Any) -> Tensor:
    losses = F.cross_entropy(module(batch[0]), batch[1], reduction="none").repeat_interleave(2)
    kept = torch.arange(len(losses)) % 4 < 3  # every other sample has one token less
    return (losses * kept).sum() / kept.sum()


def contrastive(module: Plain, batch: Any) -> Tensor:
    z = module(batch[0])
    return F.cross_entropy(z @ z.t(), torch.arange(len(z)))


def random(module: Plain, batch: Any) -> Tensor:
    return F.cross_entropy(F.dropout(module(batch[0]), 0.5), batch[1])


def needs_two(module: Plain, batch: Any) -> Tensor:
    return F.mse_loss(module(batch[0])[:, 0], batch[1].double()) + batch[0].squeeze().mean(dim=2).mean()


def nothing(module: Plain, batch: Any) -> Any:
    return None


@pytest.mark.parametrize(
    ("loss_of", "error", "message"),
    [
        (
            weighted,
            BatchDependenceError,
            r"loss that `training_step` of Plain returns is neither the mean nor the sum of one term a sample: "
            r"\d samples have the losses [\d., ]+ one by one \(mean [\d.]+, sum [\d.]+\), but [\d.]+ together",
        ),
        (contrastive, BatchDependenceError, r"losses that compare samples. Say with the mixin what the loss"),
        (
            lambda m, b: cross_entropy(m, b).square(),
            BatchDependenceError,
            r"class AttributedPlain\(AttributionMixin, Plain\):\n +model_output = NegativeLoss\(lambda",
        ),
        (random, BatchDependenceError, r"is random: the same 4 samples give [\d.]+, then [\d.]+\. .*self.training"),
        (needs_two, BatchDependenceError, r"runs on 4 samples, but not on one alone \(IndexError: Dimension out of"),
        (nothing, TypeError, r"return its loss, a tensor of one value, .*but got NoneType"),
        (lambda m, b: {"x": b[0]}, TypeError, "but got NoneType"),
        (lambda m, b: 0.5, TypeError, "but got float"),
        (lambda m, b: squares(m, b).mean(1), TypeError, r"but got a tensor of shape \(4,\)"),
        (
            lambda m, b: cross_entropy(m, b) / (b[1][0] * 0),
            NonFiniteGradientError,
            r"training loss is NaN or Inf \(positions \[0, 1, 2, 3\] of the 4 samples that were tried\)",
        ),
    ],
)
def test_losses_that_are_not_made_of_one_term_a_sample(loss_of: LossOf, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(plain(loss_of), (data(4)[0], torch.tensor([0, 1, 2, 1])), 4)


@pytest.mark.parametrize(("loss_of", "same"), [(weighted, torch.zeros), (padded, None)])
def test_a_mean_that_is_one_only_for_the_first_samples(loss_of: LossOf, same: Any) -> None:
    """The probe cannot know; every batch is compared again."""
    (x, y), alike = data(12), torch.zeros(4).long()
    if loss_of is padded:
        x[:4], y[:4] = x[0], y[0]  # the weights do not matter where all losses are equal
        alike = y[:4]
    module = plain(loss_of)
    featurize = Featurizer(
        module, plan(module, (x[:4], alike), 4), IdentityProjector().bind(ParameterLayout.of(module), "final")
    )
    with pytest.raises(BatchDependenceError, match="neither the mean nor the sum of one term a sample: 12 samples"):
        featurize((x, y), range(12))


def test_the_mean_of_equal_parts_is_no_proof() -> None:
    """Whole and halves agree with a mean here; one and three samples do not."""

    def loss_of(module: Plain, batch: Any) -> Tensor:
        losses = F.cross_entropy(module(batch[0]), batch[1], reduction="none")
        return losses.mean() * (1 if len(losses) in {1, 2, 4} else 1.01)

    with pytest.raises(BatchDependenceError, match="3 samples have the losses"):
        plan(plain(loss_of), data(4), 4)


@pytest.mark.parametrize(
    "batch",
    [
        [torch.ones(2, 5), torch.ones(2, 6), torch.ones(2, 7), torch.ones(2, 8)],
        (torch.ones(4, 2, 5), [{"y": torch.ones(2)}, {"y": torch.ones(3)}, {"y": torch.ones(1)}, {"y": torch.ones(3)}]),
        {"x": torch.ones(4, 2, 5), "boxes": [torch.ones(2), torch.ones(3), torch.ones(1), torch.ones(3)]},
        torch.ones(()),
    ],
    ids=["list", "targets in a list", "dict", "scalar"],
)
def test_a_batch_that_cannot_be_split(batch: Any) -> None:
    """A "sample" of it would be the whole batch, whose loss is its own mean."""
    module = plain(lambda m, b: m(torch.ones(4, 2, 5).double()).mean())
    with pytest.raises(ValueError, match=r"batch of Plain to hold tensors of shape \(4, ...\) for its 4 samples"):
        plan(module, batch, 4)


def test_a_gradient_that_is_not_finite_names_its_sample() -> None:
    module, (x, y) = plain(lambda m, b: m(b[0]).mul(b[0][:, 0, :3]).sum(1).abs().sqrt().mean()), data()
    featurize = featurizer(module, (x, y))
    x[7, 0] = 0
    with pytest.raises(NonFiniteGradientError, match=r"The gradient of sample 7 is NaN or Inf \(1 of the 9 samples"):
        featurize((x, y), range(B))
    x[7, 0], x[3] = 1, float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"The \w+ of sample 3 is NaN or Inf \(1 of the 9 samples"):
        featurize((x, y), range(B))


class Manual(Plain):
    automatic_optimization = False

    def __init__(self, loss_of: LossOf) -> None:
        super().__init__(loss_of)
        self.automatic_optimization = False


class Iterates(Plain):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        return self.loss_of(self, next(dataloader_iter))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Manual, r"Expected Manual to return its loss from `training_step`, but it optimizes by hand \(automatic_opt"),
        (
            Iterates,
            r"`training_step` of Iterates to take a batch, but it takes `dataloader_iter`. Write `class AttributedI",
        ),
    ],
)
def test_training_steps_that_give_no_loss_of_a_batch(kind: type[Plain], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check_module(kind(cross_entropy))
    with pytest.raises(TypeError, match=message):
        attribute(quiet_trainer(), model=kind(cross_entropy), train_dataloaders=loader_of(TensorDataset(*data())))
    with pytest.raises(TypeError, match=message):
        quiet_trainer(callbacks=[AttributionCallback("store")]).fit(kind(cross_entropy), loader_of(blobs(8)))


@pytest.mark.parametrize("candidate", [nn.Linear(1, 1), AttributionMixin(), object(), L.LightningModule()])
def test_modules_without_any_step(candidate: object) -> None:
    name = type(candidate).__name__
    expected = (
        f"Expected {name} to have lightning_attr.AttributionMixin among its bases, or to be a LightningModule with a "
        rf"`training_step`, but it is neither. Write `class Attributed{name}\(AttributionMixin, {name}\)`"
    )
    with pytest.raises(TypeError, match=expected):
        check_module(candidate)


def test_check_module_passes_modules_with_a_step() -> None:
    class Mixed(AttributionMixin, nn.Linear):
        pass

    check_module(plain(cross_entropy))
    check_module(Mixed(1, 1))


# End to end ------------------------------------------------------------------------------------------------------


class Meticulous(L.LightningModule):
    """A step as people write it: it logs, counts, collects, and keeps metrics."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(
                nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
            )
        self.accuracy = MulticlassAccuracy(3)
        self.register_buffer("centre", torch.zeros(4))
        self.step_count, self.losses, self.history = 0, [], {"norms": []}  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.step_count += 1
        self.losses.append(loss.item())
        self.history["norms"].append(logits.norm().item())
        self.centre += x.mean(0)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"loss": loss}, on_step=True)
        if self.logger is not None:
            self.logger.log_metrics({"direct": loss.item()})
        self.print("step", self.step_count)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


class WithMixin(AttributionMixin, Meticulous):
    model_output = NegativeLoss(lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"))


def trained(module: Meticulous, folder: Any, *callbacks: L.Callback) -> Any:
    torch.manual_seed(3)
    logger = CSVLogger(folder, flush_logs_every_n_steps=1)
    trainer = quiet_trainer(
        max_epochs=3, callbacks=list(callbacks), logger=logger, log_every_n_steps=1, kind=AttributionTrainer
    )
    trainer.fit(module, DataLoader(blobs(26), batch_size=8, shuffle=True))
    return trainer


def state_of(module: Meticulous) -> dict[str, Any]:
    return {
        **{name: tensor.clone() for name, tensor in module.state_dict().items()},
        **{f"accuracy.{name}": value for name, value in module.accuracy.metric_state.items()},
        "updates": module.accuracy._update_count,
        "own": (module.step_count, list(module.losses), list(module.history["norms"])),
        "attributes": sorted(vars(module)),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value, name


def test_a_fit_is_bit_identical_with_the_callback(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    alone, beside = Meticulous(), Meticulous()
    trained(alone, tmp_path / "alone")
    printed = capsys.readouterr().out
    trained(beside, tmp_path / "beside", AttributionCallback(tmp_path / "store", TRAK(16), log=False))
    assert_same(state_of(beside), state_of(alone))
    assert capsys.readouterr().out == printed
    path = "lightning_logs/version_0/metrics.csv"
    assert (tmp_path / "beside" / path).read_text() == (tmp_path / "alone" / path).read_text()
    assert len(FeatureStore.open(tmp_path / "store").snapshots) == 3


@pytest.mark.parametrize("method", [TRAK(16), GradDot(projector=IdentityProjector())])
def test_scores_are_those_of_the_mixin_with_the_negative_loss(tmp_path: Any, method: Any) -> None:
    results = []
    for kind in (Meticulous, WithMixin):
        module = kind()
        trainer = trained(module, tmp_path / kind.__name__, AttributionCallback(tmp_path / kind.__name__ / "s", method))
        before, metrics = state_of(module), dict(trainer.callback_metrics)
        result = trainer.attribute(target_dataloaders=loader_of(blobs(5, seed=1)))
        assert_same(state_of(module), before)
        assert trainer.callback_metrics == metrics
        assert [type(logger) for logger in trainer.loggers] == [CSVLogger]
        results.append(result)
    plain, mixed = results
    assert plain.scores.shape == (26, 5)
    torch.testing.assert_close(plain.scores.values, mixed.scores.values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plain.self_influence, mixed.self_influence, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plain.loss, mixed.loss)
    assert plain.labels is None


def test_attribute_with_a_trainer_that_never_fitted() -> None:
    module = Meticulous()
    before = state_of(module)
    result = attribute(quiet_trainer(), model=module, train_dataloaders=loader_of(blobs(11)), targets="train")
    assert result.scores.shape == (11, 11)
    assert_same(state_of(module), before)


def test_refused_before_training(tmp_path: Any) -> None:
    class Weighted(Meticulous):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], weight=torch.tensor([1.0, 3.0, 9.0]))

    module = Weighted()
    with pytest.raises(BatchDependenceError, match=r"class AttributedWeighted\(AttributionMixin, Weighted\)"):
        trained(module, tmp_path, AttributionCallback(tmp_path / "store"))
    assert module.step_count == 0
    assert not (tmp_path / "store").exists()


def test_nothing_is_said_of_a_common_loss(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning_attr"):
        featurizer(plain(cross_entropy), data())
    assert caplog.text == ""
