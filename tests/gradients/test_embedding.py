"""Rules of tables against autograd, one sample after the other, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cases import LayersOf, check_gradients
from lightning_attr.errors import UnsupportedLayerError
from lightning_attr.gradients import hooked_gradients
from lightning_attr.gradients.rules import check_layers

B = 3


@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("ids", [[0, 2, 2], [[0, 1, 1, 2], [3, 3, 3, 3], [1, 2, 0, 0]]])
def test_embedding(ids: list[int], padding_idx: int | None) -> None:
    check_gradients(nn.Embedding(4, 5, padding_idx=padding_idx), torch.tensor(ids))


def test_embedding_of_ids_shared_by_the_batch() -> None:
    check_gradients(nn.Embedding(4, 5), torch.tensor([[0, 2, 1]]))


BAGS = torch.tensor([[0, 1, 1, 2], [3, 3, 3, 3], [1, 2, 0, 0]])


@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag(mode: str, padding_idx: int | None) -> None:
    check_gradients(nn.EmbeddingBag(4, 5, mode=mode, padding_idx=padding_idx), BAGS)


def test_embedding_bag_with_an_empty_bag() -> None:
    layer = nn.EmbeddingBag(4, 5, mode="mean", padding_idx=1)
    model = LayersOf(lambda m, x: m.bag(x) + m.shift(x[:, 0]), bag=layer, shift=nn.Embedding(4, 5))
    found = torch.cat([model.double()(BAGS[i : i + 1]) for i in range(3)])
    assert found.isfinite().all()
    ids = torch.tensor([[1, 1, 1], [0, 1, 2], [3, 3, 1]])
    rows: dict[str, Tensor] = {}
    hooked_gradients(model, lambda: model(ids), 3, ["bag.weight"], lambda name, g: rows.update({name: g.materialise()}))
    assert rows["bag.weight"][0].abs().sum() == 0
    expected = torch.autograd.grad(model(ids[2:])[0], layer.weight)[0]
    torch.testing.assert_close(rows["bag.weight"][2], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("by_keyword", [True, False])
def test_embedding_bag_with_weights(by_keyword: bool) -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Embedding(4, 1)
            self.bag = nn.EmbeddingBag(4, 5, mode="sum", padding_idx=0)

        def forward(self, ids: Tensor) -> Tensor:
            weights = self.score(ids)[..., 0].tanh()
            return self.bag(input=ids, per_sample_weights=weights) if by_keyword else self.bag(ids, None, weights)

    check_gradients(Weighted(), torch.tensor([[2, 1, 1, 2], [3, 3, 0, 3], [1, 2, 0, 0]]))


@pytest.mark.parametrize("form", ["offsets", "max"])
def test_embedding_bags_of_other_forms_are_left_to_the_fallback(form: str) -> None:
    offsets = torch.arange(0, BAGS.numel(), BAGS.shape[1]) if form == "offsets" else None
    layer = nn.EmbeddingBag(4, 5, mode="max" if form == "max" else "sum")
    seen: list[str] = []
    ids = BAGS.flatten() if form == "offsets" else BAGS
    hooked_gradients(layer, lambda: layer(ids, offsets).sum(1), 3, ["weight"], lambda name, g: seen.append(name))
    assert seen == []


@pytest.mark.parametrize("argument", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embedding_bag_without_per_sample_gradient_is_refused_by_name(argument: dict[str, float]) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"`0` \(EmbeddingBag\).*`max_norm` or `scale_grad_by_freq`"):
        check_layers(nn.Sequential(nn.EmbeddingBag(3, 2, **argument)))
