"""The mixin: a module's own output, as a function of its weights."""

from __future__ import annotations

from collections import UserDict
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_attr import AttributionMixin
from lightning_attr.outputs import BinaryMargin, Regression

B = 4
X, Y = torch.randn(B, 3, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 1, 2])


class Classifier(AttributionMixin, L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def _classifier() -> Classifier:
    return Classifier().double().eval()


def _other_weights(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    params = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    buffers = {name: b + 1 if b.dtype.is_floating_point else b for name, b in module.named_buffers()}
    return params, buffers


@pytest.mark.parametrize("batch", [(X, Y), [X, Y]], ids=["tuple", "list"])
def test_at_its_own_weights_it_is_the_module(batch: Any) -> None:
    module = _classifier()
    outputs, targets = module.attribution_step(batch)
    assert torch.equal(targets, Y)
    torch.testing.assert_close(outputs, module(X))
    expected = module.model_output.output(module(X), Y)
    for params in ({}, dict(module.named_parameters()), {"network.0.bias": module.network[0].bias}):
        torch.testing.assert_close(module.functional_output(params, {}, batch), expected, rtol=0, atol=0)
    assert torch.equal(module.functional_loss({}, {}, batch), module.model_output.loss(module(X), Y))


def test_at_other_weights_it_is_a_module_that_has_them() -> None:
    module = _classifier()
    before = deepcopy(module.state_dict())
    params, buffers = _other_weights(module)
    other = deepcopy(module)
    other.load_state_dict({**params, **buffers})
    for functional, part in ((module.functional_output, "output"), (module.functional_loss, "loss")):
        expected = getattr(module.model_output, part)(other(X), Y)
        torch.testing.assert_close(functional(params, buffers, (X, Y)), expected, rtol=0, atol=0)
        some = {"network.3.weight": params["network.3.weight"]}
        assert not torch.equal(functional(some, {}, (X, Y)), expected)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_it_is_differentiable_in_the_weights() -> None:
    module = _classifier()
    params = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    found = torch.autograd.grad(module.functional_output(params, {}, (X, Y)).sum(), list(params.values()))
    output = module.model_output.output(module(X), Y).sum()
    for gradient, expected in zip(found, torch.autograd.grad(output, list(module.parameters())), strict=True):
        torch.testing.assert_close(gradient, expected)
    assert all(p.grad is None for p in module.parameters())


class Tied(AttributionMixin, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def test_a_tied_weight_is_replaced_everywhere() -> None:
    module, ids = Tied(), torch.tensor([0, 4])
    other = torch.randn(5, 3)
    found = module.functional_output({"embedding.weight": other}, {}, (ids, ids))
    torch.testing.assert_close(found, module.model_output.output(other[ids] @ other.T, ids))


@dataclass
class Record:
    inputs: dict[str, Tensor]
    target: Tensor


class Line(AttributionMixin, nn.Module):
    """Takes any batch that it is told how to read."""

    model_output = Regression()

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.linear, self.read = nn.Linear(3, 1).double(), read

    def attribution_step(self, batch: Any) -> tuple[Any, Any]:
        x, y = self.read(batch)
        return self.linear(x), y


@pytest.mark.parametrize(
    ("batch", "read"),
    [
        ({"x": X, "y": Y.double()}, lambda batch: (batch["x"], batch["y"])),
        (Record({"x": X}, Y.double()), lambda batch: (batch.inputs["x"], batch.target)),
        (((X, ["text"] * B), {"y": [Y.double()]}), lambda batch: (batch[0][0], batch[1]["y"][0])),
        (X, lambda x: (x, x[:, 0])),
    ],
    ids=["dict", "dataclass", "nested", "tensor"],
)
def test_any_batch_through_an_attribution_step_of_your_own(batch: Any, read: Any) -> None:
    module = Line(read)
    weight = torch.ones(1, 3).double()
    found = module.functional_output({"linear.weight": weight}, {}, batch)
    torch.testing.assert_close(found, X.sum(1) + module.linear.bias.detach())


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"x": X, "label": Y}, r"a dict with the keys \['label', 'x'\]"),
        ((X, Y, Y), "a tuple of 3"),
        ([X], "a list of 1"),
        (X, "a Tensor"),
    ],
)
def test_a_batch_that_is_no_pair(batch: Any, found: str) -> None:
    expected = rf"Expected a batch \(x, y\), but got {found}. Override `attribution_step\(self, batch\)` in Classifier"
    with pytest.raises(TypeError, match=expected):
        _classifier().attribution_step(batch)


class Words(AttributionMixin, L.LightningModule):
    """Takes the keys of a batch, as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.head(self.embedding(input_ids).mean(1)), loss=labels)


IDS = torch.tensor([[1, 2], [3, 4], [5, 6], [1, 6]])
TEXT = {"input_ids": IDS, "labels": Y}


@pytest.mark.parametrize("wrap", [dict, UserDict])
def test_a_dict_with_labels_goes_to_forward_by_its_keys(wrap: Any) -> None:
    module = Words()
    outputs, targets = module.attribution_step(wrap(TEXT))
    assert torch.equal(outputs, module(IDS).logits)
    assert targets is Y
    expected = module.model_output.output(module(IDS).logits, Y)
    assert torch.equal(module.functional_output({}, {}, wrap(TEXT)), expected)


def test_forward_may_return_the_logits_themselves() -> None:
    class Plain(Words):
        def forward(self, **batch: Tensor) -> Tensor:
            return super().forward(**batch).logits

    assert torch.equal(Plain().attribution_step(TEXT)[0].isfinite(), torch.ones(B, 3).bool())


class Other(Words):
    def forward(self, batch: Any) -> Any:
        return batch


class Losses(Words):
    def forward(self, **batch: Tensor) -> Any:
        return {"loss": batch["labels"]}


class WithoutForward(AttributionMixin, L.LightningModule):
    pass


class Broken(Words):
    def forward(self, **batch: Tensor) -> Any:
        return batch["input_ids"] + None


@pytest.mark.parametrize(
    ("kind", "batch", "message"),
    [
        (Other, TEXT, r"`forward` of Other to take the keys of the batch, \['input_ids', 'labels'\], but missing"),
        (Words, {**TEXT, "id": IDS}, r"but got an unexpected keyword argument 'id'. With the model in an attribute"),
        (WithoutForward, TEXT, r"WithoutForward to have a `forward`, but it has none. With the model in an attribute"),
        (Losses, TEXT, r"Losses to return logits, .* but got a dict. With the model in an attribute, override"),
        (Words, {**TEXT, "labels": [0, 1, 1, 2]}, r"`labels` of the batch to be a tensor .* but got a list: nobody"),
        (
            Words,
            {**TEXT, "input_ids": [[1], [2, 3]]},
            r"`input_ids` of the batch .* \(`tokenizer.pad_token =",
        ),
        (Broken, TEXT, r"unsupported operand type"),
    ],
)
def test_a_dict_that_forward_does_not_take(kind: type[Words], batch: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        kind().attribution_step(batch)


def test_the_model_output_is_a_choice_of_class_or_instance() -> None:
    class Binary(AttributionMixin, nn.Linear):
        model_output = BinaryMargin()

    module = Binary(3, 1).double()
    torch.testing.assert_close(module.functional_output({}, {}, (X, torch.ones(B))), module(X)[:, 0])
    module.model_output = Regression()
    assert isinstance(Binary.model_output, BinaryMargin)
    torch.testing.assert_close(module.functional_loss({}, {}, (X, torch.zeros(B))), module(X)[:, 0] ** 2 / 2)


def test_the_module_keeps_its_state_dict() -> None:
    module = _classifier()
    names = list(module.state_dict())
    module.functional_output({}, {}, (X, Y))
    assert list(module.state_dict()) == names


class Shared(AttributionMixin, nn.Module):
    """One layer of two names, and one parameter in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRU(3, 3, batch_first=True)
        self.second = self.first
        self.head, self.tied = nn.Linear(3, 3), nn.Linear(3, 3)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        states = self.second(self.first(x[:, None])[0].tanh())[0][:, -1]
        return self.tied(self.head(states).tanh())


def test_shared_layers_and_tied_parameters_are_swapped_everywhere_and_put_back() -> None:
    module = Shared().double().eval()
    slots = [p for layer in module.modules() for p in layer._parameters.values()]
    params, _ = _other_weights(module)
    other = deepcopy(module)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(params[name])
    expected = other.model_output.output(other(X), Y)
    torch.testing.assert_close(module.functional_output(params, {}, (X, Y)), expected, rtol=0, atol=0)
    after = [p for layer in module.modules() for p in layer._parameters.values()]
    assert all(p is before for p, before in zip(after, slots, strict=True))
