"""Scores by position: they add up, and each is what the layers did at that position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from text_cases import MODELS, LitText, bert, gpt2, padded, samples, settled
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cases import quiet_trainer
from lightning_attr import AttributionMixin
from lightning_attr.gradients import loop_gradients
from lightning_attr.methods import GradDot
from lightning_attr.modalities.position_scores import position_products, position_scores
from lightning_attr.outputs import LanguageModel
from lightning_attr.projectors import IdentityProjector


def _rows(module: Any, batch: Any, b: int) -> dict[str, Tensor]:
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return loop_gradients(lambda p, one: module.functional_output(p, {}, one), trainable, batch, b)


def _flat(rows: dict[str, Tensor]) -> Tensor:
    return torch.cat([row.flatten(1) for row in rows.values()], 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_positions_and_the_rest_add_up_to_the_score(name: str, dtype: torch.dtype) -> None:
    module = settled(MODELS[name]()).to(dtype)
    batch, targets = padded(samples(name)), padded(samples(name, (6, 3)))
    length = batch["input_ids"].shape[1]
    found = position_scores(module, batch, targets, length if name == "BERT" else None)
    q = module.model_output.out_to_loss(*module.attribution_step(batch))[:, None]
    expected = q * (_flat(_rows(module, batch, 5)) @ _flat(_rows(module, targets, 2)).T)
    assert found.positions.shape == (5, 2, length if name in {"BERT", "GPT-2"} else length - 1)
    assert (found.total() - expected).abs().max() / expected.abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)
    assert found.rest.abs().max() > 0


def test_they_are_the_scores_of_the_trainer() -> None:
    module, data = settled(gpt2(model_output=LanguageModel("margin_of_mean"))), samples("GPT-2")
    loader = DataLoader(data, batch_size=5, collate_fn=padded)
    result = quiet_trainer().attribute(
        model=module, train_dataloaders=loader, targets="train", method=GradDot(IdentityProjector())
    )
    found = position_scores(module, padded(data), padded(data)).total()
    scale = found.abs().max().item()
    torch.testing.assert_close(torch.as_tensor(result.scores.values).double(), found, rtol=1e-4, atol=1e-5 * scale)


class Layers(AttributionMixin, nn.Module):
    """Each position on its own: what a layer does at one of them is known by leaving out the others."""

    model_output = LanguageModel(shift=False)

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head, self.norm = nn.Embedding(6, 4), nn.Linear(4, 6), nn.LayerNorm(6)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.norm(self.head(self.embedding(input_ids).tanh()))


def test_a_position_is_what_the_layers_did_there() -> None:
    module, ids = Layers().double().eval(), torch.randint(0, 6, (3, 5))
    batch = {"input_ids": ids, "labels": ids.roll(1, 1)}
    positioned = ["embedding.weight", "head.weight", "head.bias"]
    directions = {name: torch.randn(2, *p.shape).double() for name, p in module.named_parameters()}
    found = position_products(module, batch, directions)
    for s in range(5):
        one = {key: x[:, s : s + 1] for key, x in batch.items()}
        rows = _rows(module, one, 3)
        expected = sum(rows[name].flatten(1) @ directions[name].flatten(1).T for name in positioned)
        torch.testing.assert_close(found.positions[:, :, s], expected)
    rows = _rows(module, batch, 3)
    rest = sum(rows[name] @ directions[name].T for name in ("norm.weight", "norm.bias"))
    torch.testing.assert_close(found.rest, rest)


def test_parameters_without_a_direction_have_no_part() -> None:
    module, batch = settled(gpt2()), padded(samples("GPT-2"))
    name = "model.transformer.h.0.mlp.c_fc.weight"
    direction = torch.randn(3, *module.get_parameter(name).shape).double()
    found = position_products(module, batch, {name: direction})
    torch.testing.assert_close(found.total(), _rows(module, batch, 5)[name].flatten(1) @ direction.flatten(1).T)
    assert not found.rest.any()
    assert (found.positions[0, :, 4:] == 0).all()  # padding of the first sequence


def test_layers_of_another_length_are_the_rest() -> None:
    module, batch = settled(bert()), padded(samples("BERT"))
    name = "model.classifier.weight"
    found = position_products(module, batch, {name: torch.ones(1, 3, 16).double()}, length=7)
    assert found.rest.any()
    assert not found.positions.any()


def test_parameters_without_a_rule_are_the_rest() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.linalg.matrix_exp(self.matrix)

    class Unknown(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Own()

    module, ids = Unknown().double().eval(), torch.randint(0, 6, (3, 5))
    batch = {"input_ids": ids, "labels": ids}
    directions = {name: torch.randn(2, *p.shape).double() for name, p in module.named_parameters()}
    expected = _flat(_rows(module, batch, 3)) @ _flat(directions).T
    torch.testing.assert_close(position_products(module, batch, directions).total(), expected)


@pytest.mark.parametrize(
    ("change", "length", "message"),
    [
        (lambda d: {"model.nothing": torch.ones(1)}, 7, r"tensors \(q, \*shape\) .* but got 'model.nothing' of shape"),
        (lambda d: {"model.classifier.bias": torch.ones(3)}, 7, r"'model.classifier.bias' of shape \(3,\)"),
        (lambda d: d, None, "`length`, the number of positions to split by, as there is not one label"),
    ],
)
def test_bad_arguments(change: Callable[[Any], Any], length: int | None, message: str) -> None:
    module: LitText = settled(bert())
    directions = {"model.classifier.bias": torch.ones(1, 3).double()}
    with pytest.raises(ValueError, match=message):
        position_products(module, padded(samples("BERT")), change(directions), length)
