"""Whatever a step does: training stays what it was to the last bit, and every sample is seen from the same state."""

from __future__ import annotations

import copy
import logging
from collections import UserDict
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from cases import quiet_trainer
from lightning_attr import AttributionMixin
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError
from lightning_attr.methods import GradDot
from lightning_attr.outputs import Regression
from lightning_attr.user_code.batch_copies import OwnBatch
from lightning_attr.user_code.calls import user_call
from lightning_attr.user_code.isolation import undisturbed
from lightning_attr.user_code.training_step import training_loss

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 3, generator=GENERATOR), torch.randn(12, 4, generator=GENERATOR)

pytestmark = pytest.mark.filterwarnings("ignore:.*Sparse")


class Step(L.LightningModule):
    """A regression; subclasses say what the step does besides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.online = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        self.teacher = copy.deepcopy(self.online).requires_grad_(False)

    def besides(self, batch: Any) -> Tensor | float:
        """Act, and return what is added to the targets."""
        return 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        shift = self.besides(batch)
        return F.mse_loss(self.online(batch[0]), batch[1] + shift)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.online.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Momentum(Step):
    changes = "teacher.0.weight"

    def besides(self, batch: Any) -> Tensor:
        with torch.no_grad():
            for own, other in zip(self.teacher.parameters(), self.online.parameters(), strict=True):
                own.mul_(0.9).add_(other, alpha=0.1)
        return self.teacher(batch[0])


class MomentumOfResults(Momentum):
    """The teacher runs on what the student says: its weights are saved for the backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.besides(batch)
        return F.mse_loss(self.teacher(self.online(batch[0])[:, :3]), batch[1])


class MomentumByData(Step):
    changes = "teacher.0.weight"

    def besides(self, batch: Any) -> Tensor:
        for own, other in zip(self.teacher.parameters(), self.online.parameters(), strict=True):
            own.data = own.data * 0.9 + other.data * 0.1
        return self.teacher(batch[0])


class Decay(Step):
    changes = "online.2.weight"

    def besides(self, batch: Any) -> float:
        with torch.no_grad():
            self.online[2].weight.mul_(0.95)
        return 0.0


class Bank:
    def __init__(self) -> None:
        self.queue, self.next, self.seen = torch.ones(6, 4), 0, np.zeros(2)

    def add(self, keys: Tensor) -> Tensor:
        for key in keys.detach():
            self.queue[self.next] = 0.5 * key
            self.next = (self.next + 1) % len(self.queue)
        self.seen += 1
        return self.queue.mean(0) * float(self.seen[0])


class Queue(Step):
    changes = "bank.queue"

    def __init__(self) -> None:
        super().__init__()
        self.bank = Bank()

    def besides(self, batch: Any) -> Tensor:
        before = self.bank.queue.mean(0)
        self.bank.add(self.online(batch[0]))
        return before


class Meter:
    __slots__ = ("count", "total")

    def __init__(self) -> None:
        self.count, self.total = 0, torch.zeros(())


@dataclass
class Centre:
    value: Tensor = field(default_factory=lambda: torch.zeros(4))
    history: list[Tensor] = field(default_factory=list)


class Records(Step):
    changes = "meters[0].total"

    def __init__(self) -> None:
        super().__init__()
        self.meters, self.centres = [Meter()], {"centre": Centre()}
        self.rng = torch.Generator().manual_seed(3)

    def besides(self, batch: Any) -> Tensor:
        (meter,), centre = self.meters, self.centres["centre"]
        meter.count += 1
        meter.total += 1
        centre.history.append(batch[0])
        centre.value = centre.value + torch.rand(4, generator=self.rng)
        return centre.value / meter.total * len(centre.history) * meter.count


class Statistics(Step):
    """A layer in train mode, whose statistics are written to without a new version."""

    changes = "norm.running_mean"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.register_buffer("steps", torch.zeros(()))

    def besides(self, batch: Any) -> Tensor:
        self.norm.train()
        self.norm(torch.ones(2, 3) * (1 + self.steps))
        self.steps = self.steps + 1
        return self.norm.running_mean.mean() + self.steps


class Optimizers(Step):
    changes = "online.0.weight"

    def besides(self, batch: Any) -> float:
        optimizer = self.optimizers(use_pl_optimizer=False)
        scale = optimizer.param_groups[0]["lr"]
        for p in self.online.parameters():
            p.grad = torch.full_like(p, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] *= 0.99
        self.lr_schedulers().step()
        return 0.01 * scale


class Flags(Step):
    changes = ""

    def besides(self, batch: Any) -> float:
        self.online[0].requires_grad_(False)
        self.teacher.requires_grad_(True)
        self.online[0].requires_grad_(True)
        self.teacher.train()
        self.hidden = {"seen": [batch]}
        return 0.0


class Odd(Step):
    """Scripted, pruned, expanded, sparse and made in inference mode."""

    changes = "scripted.weight"

    def __init__(self) -> None:
        super().__init__()
        self.scripted = torch.jit.script(nn.Linear(3, 4).requires_grad_(False))
        prune.l1_unstructured(self.online[0], "weight", amount=3)
        self.register_buffer("ones", torch.ones(1).expand(4))
        with torch.inference_mode():
            self.made = torch.ones(4)

    def besides(self, batch: Any) -> Tensor:
        with torch.no_grad():
            self.scripted.weight.mul_(0.9)
        with torch.inference_mode():
            self.made.mul_(0.5)
        return self.scripted(batch[0]) + self.ones + self.made.clone()


ZOO = [
    Momentum,
    MomentumOfResults,
    MomentumByData,
    Decay,
    Queue,
    Records,
    Statistics,
    Optimizers,
    Flags,
    Odd,
]


def loader(batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size, shuffle=True)


def fitted(kind: type[Step], *callbacks: Any) -> tuple[Any, Any]:
    L.seed_everything(0, verbose=False)
    module = kind()
    trainer = quiet_trainer(max_epochs=2, callbacks=[*callbacks])
    trainer.fit(module, loader())
    return module, trainer


def everything(module: Any, trainer: Any) -> list[Tensor]:
    tensors = [*module.state_dict().values()]
    tensors += [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    if isinstance(module, Queue):
        tensors += [module.bank.queue, torch.tensor(module.bank.next), torch.from_numpy(module.bank.seen)]
    if isinstance(module, Records):
        centre = module.centres["centre"]
        tensors += [module.meters[0].total, centre.value, torch.tensor(len(centre.history))]
    if isinstance(module, Odd):
        tensors.append(module.made)
    return [torch.tensor(trainer.optimizers[0].param_groups[0]["lr"]), *(t.clone() for t in tensors)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def gradients_one_by_one(module: Any) -> Tensor:
    rows = []
    for i in range(len(X)):
        alone = copy.deepcopy(module).eval()
        loss = alone.training_step((X[i : i + 1].clone(), Y[i : i + 1].clone()), 0)
        found = torch.autograd.grad(loss, [p for p in alone.parameters() if p.requires_grad], allow_unused=True)
        rows.append(torch.cat([torch.zeros(0) if g is None else g.flatten() for g in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_training_and_attribution_beside_it(kind: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected = everything(*fitted(kind))
    with caplog.at_level(logging.INFO, "lightning_attr"):
        module, trainer = fitted(kind, AttributionCallback(tmp_path / "a", method=GradDot(exact=True), log=False))
    assert same(everything(module, trainer), expected)
    assert f"`training_step` of {kind.__name__} changes " in caplog.text
    assert kind.changes in caplog.text
    method = GradDot(exact=True)
    results = [
        trainer.attribute(targets="train", train_dataloaders=loader(size), model=module, method=method)
        for size in (1, 5)
    ]
    assert same(everything(module, trainer), expected)
    torch.testing.assert_close(results[0].scores.values, results[1].scores.values, rtol=1e-4, atol=1e-6)
    if kind not in {Odd, Optimizers}:  # which cannot be copied, or needs its trainer
        rows = gradients_one_by_one(module)
        torch.testing.assert_close(results[0].scores.values, -(rows @ rows.T).T.neg(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [MomentumOfResults, MomentumByData, Decay])
def test_the_graph_of_a_first_call_is_good(kind: Any) -> None:
    module, batch = kind(), (X, Y)
    weights = list(module.online.parameters())
    alone = copy.deepcopy(module)
    expected = torch.autograd.grad(alone.training_step(batch, 0), list(alone.online.parameters()))
    for _ in range(2):
        found = torch.autograd.grad(training_loss(module, batch), weights)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


class Slopes(Step):
    """Saved tensors may have no hooks here."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(self.online))(batch[0]).square().sum()


def test_a_step_may_use_torch_func() -> None:
    module = Slopes()
    values = [training_loss(module, (X, Y)).item() for _ in range(2)]
    assert values == [module.training_step((X, Y), 0).item()] * 2


class MomentumSlopes(Momentum):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.besides(batch)
        return torch.func.vmap(torch.func.jacrev(self.online))(batch[0]).square().sum()


def test_torch_func_beside_a_change_is_named() -> None:
    module = MomentumSlopes()
    with pytest.raises(AttributionError, match=r"`training_step` of MomentumSlopes changes `teacher\.0\..*torch\.func"):
        training_loss(module, (X, Y))


# Batches ----------------------------------------------------------------------------------------------------------


class Pops(Step):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch.pop("x"), batch.pop("y")
        x.sub_(1.0).div_(2.0)
        return F.mse_loss(self.online(x), y)


class MixinPops(AttributionMixin, Pops):
    model_output = Regression()

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch.pop("x"), batch.pop("y")
        return self.online(x.sub_(1.0).div_(2.0)).sum(1), y.sum(1)


class Keeps(Step):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.online((batch["x"] - 1) / 2), batch["y"])


class MixinKeeps(AttributionMixin, Keeps):
    model_output = Regression()

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.online((batch["x"] - 1) / 2).sum(1), batch["y"].sum(1)


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": X[i], "y": Y[i]}


@pytest.mark.parametrize(("changing", "plain"), [(Pops, Keeps), (MixinPops, MixinKeeps)])
@pytest.mark.parametrize("target_function", [None, lambda module, batch: module.online(batch.pop("x").mul_(2)).sum(1)])
def test_a_step_may_take_its_batch_apart(changing: Any, plain: Any, target_function: Any) -> None:
    data = DataLoader(Rows(), 5)
    scores = [
        quiet_trainer()
        .attribute(
            model=kind(),
            train_dataloaders=data,
            target_dataloaders=data,
            method=GradDot(exact=True),
            target_function=target_function,
        )
        .scores.values
        for kind in (changing, plain)
    ]
    assert torch.equal(*scores)


@dataclass
class Pair:
    x: Tensor
    more: dict[str, Tensor]


class Graph:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def clone(self) -> Graph:
        return Graph(self.x.clone())


@pytest.mark.parametrize(
    ("make", "write"),
    [
        (lambda x: [x], lambda b: b.pop().add_(1)),
        (lambda x: {"a": {"b": x}}, lambda b: b["a"].pop("b").add_(1)),
        (lambda x: (x, [x]), lambda b: b[1].pop().add_(1)),
        (lambda x: UserDict(x=x), lambda b: b.pop("x").add_(1)),
        (lambda x: Pair(x, {"y": x}), lambda b: b.more.pop("y").add_(1)),
        (lambda x: Graph(x), lambda b: b.x.add_(1)),
        (lambda x: {"n": x.numpy()}, lambda b: np.add(b["n"], 1, out=b.pop("n"))),
    ],
)
def test_every_call_has_a_batch_of_its_own(make: Any, write: Any) -> None:
    x = torch.zeros(2)
    batch, module = make(x), nn.Linear(1, 1)
    for _ in range(2):
        with user_call(module, "step", batch) as own:
            write(own)
    assert x.tolist() == [0, 0]
    again = OwnBatch(batch, copied=False)
    assert type(again.batch) is type(batch)
    assert not again.written()


def test_nothing_is_copied_that_nobody_writes_to() -> None:
    x, module = torch.zeros(2), nn.Linear(1, 1)
    for expected in (False, True):
        with user_call(module, "step", {"x": x}) as own:
            assert (own["x"] is x) == expected
    told = pytest.raises(AttributionError, match=r"`step` of Linear writes to its batch, as it did not when")
    with told, user_call(module, "step", {"x": x}) as own:
        own["x"].add_(1)


def test_flags_of_a_batch_are_put_back() -> None:
    x, module = torch.ones(2, 1), nn.Linear(1, 1)
    for _ in range(2):
        with user_call(module, "step", x) as own:
            own.requires_grad_()
            (force,) = torch.autograd.grad(module(own).sum(), own, create_graph=True)
        assert not x.requires_grad
        force.sum().backward()


# Unforeseen ---------------------------------------------------------------------------------------------------------


def test_an_unforeseen_change_is_put_back_from_the_snapshot_or_told() -> None:
    module = nn.Linear(2, 1)
    module.register_buffer("mean", torch.zeros(2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def call(*written: Tensor) -> None:
        with user_call(module, "step"), torch.no_grad():
            for tensor in written:
                tensor.add_(1)

    with undisturbed(module, values=lambda: before):
        call()
        call(module.weight, module.mean)
        call(module.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    with undisturbed(module):
        call(module.weight, module.mean)  # known by now
        with pytest.raises(AttributionError, match="`bias` changed unforeseen during attribution"):
            call(module.bias)
