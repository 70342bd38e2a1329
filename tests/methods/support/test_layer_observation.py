"""One layer of a module, seen in a forward pass."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attr import AttributionMixin
from lightning_attr.data.memory import MemoryBudget
from lightning_attr.errors import NonFiniteGradientError
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods.support.layer_observation import class_labels, observe, observed

X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0])


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.tanh(), x


class Classifier(AttributionMixin, nn.Module):
    """Two layers of features, one that is called twice, one that is never called, and one that returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.never = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.pair = Pair()
        self.turned = nn.Flatten(0)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(self.twice(self.first(x)))
        self.turned(h)
        return self.head(input=self.pair(h)[0])


def model_of(module: nn.Module) -> SnapshotModel:
    return SnapshotModel.of(module.eval(), [(X, Y)], [(X, Y)])


def test_the_last_linear_layer_is_found() -> None:
    module = Classifier()
    seen = observe(model_of(module), (X, Y), 4)
    assert seen.name == "head"
    assert seen.layer is module.head
    torch.testing.assert_close(seen.output, module(X).detach())
    torch.testing.assert_close(module.head(seen.input).detach(), seen.output)
    assert torch.equal(seen.outputs, seen.output)
    assert torch.equal(seen.targets, Y)
    assert not seen.output.requires_grad


def test_a_layer_is_found_by_name_and_left_as_it_was() -> None:
    module = Classifier()
    seen = observe(model_of(module), (X, Y), 4, "first")
    assert torch.equal(seen.input, X)
    assert torch.equal(seen.output, module.first(X).detach())
    assert not any(inner._forward_hooks for inner in module.modules())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("second", "`layer` to name a layer of Classifier, but got 'second'. Its linear layers: 'first', 'twice', "),
        ("never", "forward pass of Classifier to call the layer 'never', but it never does"),
        ("twice", "to call the layer 'twice' once, but it calls it 2 times"),
        ("pair", "the output of the layer 'pair' to be a tensor with one row a sample, .* but got tuple"),
        ("turned", r"the output of the layer 'turned' .* of shape \(4, ...\), but got \(20,\)"),
    ],
)
def test_layers_without_one_value_a_sample_are_refused(layer: str, message: str) -> None:
    module = Classifier()
    with pytest.raises(ValueError, match=message):
        observe(model_of(module), (X, Y), 4, layer)
    assert not any(inner._forward_hooks for inner in module.modules())


def test_a_last_layer_that_is_called_twice_is_refused() -> None:
    class Shared(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.head(h) - self.head(-h)

    with pytest.raises(ValueError, match="to call the layer 'head' once, but it calls it 2 times"):
        observe(model_of(Shared()), (X, Y), 4)


def test_modules_without_linear_layers_are_refused() -> None:
    class Plain(AttributionMixin, nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x[:, None]).flatten(1)

    with pytest.raises(ValueError, match=r"Plain to have an nn.Linear .* has none. Name a `layer`: 'conv'"):
        observe(model_of(Plain()), (X, Y), 4)
    assert observe(model_of(Plain()), (X, Y), 4, "conv").output.shape == (4, 2, 1)

    class Unused(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"to call an nn.Linear, but it never does"):
        observe(model_of(Unused()), (X, Y), 4)


def test_modules_with_a_training_step_alone_have_no_outputs() -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.layer(batch[0]), batch[1])

    seen = observe(model_of(Plain()), (X, Y), 4)
    assert seen.outputs is None
    assert seen.targets is None
    assert torch.equal(seen.input, X)


def test_batches_are_split_by_the_memory_budget() -> None:
    class Halves(MemoryBudget):
        def _fitting(self, demand: Any, batch_size: int) -> int:
            return batch_size // 2

    model = model_of(Classifier())
    object.__setattr__(model, "memory", Halves())
    sizes = []

    def columns(seen: Any) -> dict[str, Tensor]:
        sizes.append(len(seen.input))
        return {"x": seen.output}

    ((rows, found),) = observed(model, model.train_batches(), columns, "first")
    assert rows == range(4)
    assert sizes[-2:] == [2, 2]
    torch.testing.assert_close(found["x"], model.module.first(X).detach())


def test_values_that_are_not_finite_are_refused() -> None:
    model, x = model_of(Classifier()), X.clone()
    x[2, 1] = torch.nan
    with pytest.raises(NonFiniteGradientError, match=r"The representations of sample 12 hold NaN .*dataset\[12\]"):
        list(observed(model, iter([(range(10, 14), (x, Y))]), lambda seen: {"representations": seen.input}))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (torch.tensor([2, 0, 1]), [2, 0, 1]),
        (torch.tensor([[2], [0], [1]]), [2, 0, 1]),
        (torch.tensor([True, False, True]), [1, 0, 1]),
        (torch.tensor([1.0, 0.0, 1.0]), [1, 0, 1]),
        (torch.tensor([1.0, 0.5, 1.0]), None),
        (torch.eye(3), None),
        (torch.tensor([1, 2]), None),
        ([0, 1, 2], None),
        (None, None),
    ],
)
def test_class_labels(targets: Any, expected: list[int] | None) -> None:
    found = class_labels(targets, 3)
    assert (found if found is None else found.tolist()) == expected
