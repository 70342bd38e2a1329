"""A data set of tokens: which there are, that one label is left of each, and that they add up to their sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from text_cases import PAD, gpt2, padded, samples, settled, t5
from torch import Tensor
from torch.utils.data import DataLoader

from cases import quiet_trainer
from lightning_attr.methods import GradDot
from lightning_attr.modalities.token_dataset import LossTokens
from lightning_attr.projectors import IdentityProjector


def _dataset(tensors: bool = False) -> list[dict[str, Any]]:
    labels = [[-100, 5, 6], [7, 8, -100, 9], [-100, -100, -100]]
    return [
        {"input_ids": list(range(len(own))), "labels": torch.tensor(own) if tensors else own, "text": "word"}
        for own in labels
    ]


@pytest.mark.parametrize("tensors", [False, True])
def test_each_row_has_the_label_of_one_token(tensors: bool) -> None:
    data = _dataset(tensors)
    tokens = LossTokens(data)
    assert tokens.places.tolist() == [[0, 1], [0, 2], [1, 1], [1, 3]]  # the first label of a causal model has no loss
    assert LossTokens(data, shift=False).places.tolist() == [[0, 1], [0, 2], [1, 0], [1, 1], [1, 3]]
    assert len(tokens) == 4
    for index, (row, position) in enumerate(tokens.places.tolist()):
        found = tokens[index]
        assert type(found["labels"]) is type(data[row]["labels"])
        labels = torch.as_tensor(found["labels"])
        assert (labels != -100).nonzero().flatten().tolist() == [position]
        assert labels[position] == data[row]["labels"][position]
        assert {**found, "labels": 0} == {**data[row], "labels": 0}
    assert torch.equal(torch.as_tensor(data[1]["labels"]), torch.tensor([7, 8, -100, 9]))  # left alone


def test_another_ignored_label() -> None:
    tokens = LossTokens([{"labels": [0, 3, 0, -100]}], shift=False, ignore_index=0)
    assert tokens.places.tolist() == [[0, 1], [0, 3]]
    assert tokens[0]["labels"] == [0, 3, 0, 0]


@pytest.mark.parametrize("tensors", [False, True])
def test_decoders_read_all_labels(tensors: bool) -> None:
    data = _dataset(tensors)[:2]
    found = LossTokens(data, shift=False, decoder_start=1)[4]
    assert torch.as_tensor(found["decoder_input_ids"]).tolist() == [1, 7, 8, 1]
    own = [{**one, "decoder_input_ids": "own"} for one in data]
    assert LossTokens(own, shift=False, decoder_start=1)[4]["decoder_input_ids"] == "own"
    assert "decoder_input_ids" not in LossTokens(data)[0]


def test_sums_go_to_the_samples() -> None:
    tokens = LossTokens(_dataset())
    values = torch.arange(8.0).reshape(4, 2)
    assert tokens.sum_by_sample(values).tolist() == [[2.0, 4.0], [10.0, 12.0], [0.0, 0.0]]
    assert torch.equal(tokens.sum_by_sample(values.T, dim=1), tokens.sum_by_sample(values).T)
    with pytest.raises(ValueError, match=r"each of the 4 tokens along dimension 1, but got shape \(4, 2\)"):
        tokens.sum_by_sample(values, dim=1)


@pytest.mark.parametrize(("module", "name"), [(gpt2, "GPT-2"), (t5, "MT5")])
def test_tokens_of_training_and_targets_add_up_to_sequences(module: Any, name: str) -> None:
    model, data = settled(module()), samples(name)
    tokens = LossTokens(data) if name == "GPT-2" else LossTokens(data, shift=False, decoder_start=PAD)

    def scores(train: Any, targets: Any) -> Tensor:
        train, targets = (DataLoader(side, batch_size=4, collate_fn=padded) for side in (train, targets))
        result = quiet_trainer().attribute(
            model=model, train_dataloaders=train, target_dataloaders=targets, method=GradDot(IdentityProjector())
        )
        return torch.as_tensor(result.scores.values).double()

    whole = scores(data, data)
    by_training_token, by_target_token = scores(tokens, data), scores(data, tokens)
    assert by_training_token.shape == (len(tokens), 5)
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * whole.abs().max().item()}
    torch.testing.assert_close(tokens.sum_by_sample(by_training_token), whole, **tolerance)
    torch.testing.assert_close(tokens.sum_by_sample(by_target_token, dim=1), whole, **tolerance)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"labels": [-100, 1]}, {"input_ids": [1, 2]}], "sample 1 .* got dict. Where a collator makes them, copy"),
        ([({"labels": [1]}, 2)], "sample 0 of the data set to be a dict .*, but got tuple"),
        ([{"labels": 3}], "under `labels`, but got int"),
        ([{"labels": torch.ones(2, 2)}], "under `labels`, but got Tensor"),
    ],
)
def test_data_without_one_label_a_token(data: list[Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        LossTokens(data)


def test_data_without_any_loss() -> None:
    with pytest.raises(ValueError, match=r"all labels of its 2 samples are ignored \(-100\)"):
        LossTokens([{"labels": [5, -100]}, {"labels": [-100]}])
