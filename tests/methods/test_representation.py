"""Similarity of representations, against loops over pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin
from lightning_attr.errors import AttributionError
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods import RepresentationSimilarity, SnapshotFeatures

N, M = 7, 4


class Reader(AttributionMixin, nn.Module):
    """A classifier of sequences ``(b, t, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.map, self.head = nn.Linear(3, 5), nn.Conv2d(1, 2, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cells(x).tanh()
        return self.head(h.mean(1)) + self.map(x[:, None]).mean((1, 2, 3))[:, None] * torch.tensor([1.0, 2.0])


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, 3, generator=generator).double(), torch.randint(2, (n,), generator=generator)


TRAIN, TARGETS = data(N, 0), data(M, 1)


def scores_of(method: RepresentationSimilarity, module: nn.Module) -> tuple[Tensor, Tensor]:
    parts = [(TRAIN[0][:3], TRAIN[1][:3]), (TRAIN[0][3:], TRAIN[1][3:])]
    snapshot = SnapshotFeatures.at(SnapshotModel.of(module.double().eval(), parts, [TARGETS]), {})
    blocks = list(method.score([snapshot]))
    assert [block.rows for block in blocks] == [range(3), range(3, N)]
    return torch.cat([block.scores for block in blocks]), torch.cat([block.self_influence for block in blocks])


SIMILARITIES = {
    "dot": lambda a, b: (a * b).sum(),
    "cosine": lambda a, b: F.cosine_similarity(a, b, dim=0),
    "l2": lambda a, b: -(a - b).square().sum(),
}
REPRESENTATIONS: dict[tuple[str | None, str], Any] = {
    (None, "mean"): lambda m, x: m.cells(x).tanh().mean(1),
    ("cells", "mean"): lambda m, x: m.cells(x).mean(1),
    ("cells", "last"): lambda m, x: m.cells(x)[:, -1],
    ("cells", "flatten"): lambda m, x: m.cells(x).flatten(1),
    ("map", "last"): lambda m, x: m.map(x[:, None]).flatten(1),
}


@pytest.mark.parametrize("similarity", list(SIMILARITIES))
@pytest.mark.parametrize(("layer", "tokens"), list(REPRESENTATIONS))
def test_scores_are_those_of_a_loop(similarity: str, layer: str | None, tokens: str) -> None:
    module = Reader().double()
    scores, self_influence = scores_of(RepresentationSimilarity(layer, similarity, tokens), module)
    h, z = (REPRESENTATIONS[layer, tokens](module, x).detach() for x, _ in (TRAIN, TARGETS))
    compare = SIMILARITIES[similarity]
    expected = torch.stack([torch.stack([compare(a, b) for b in z]) for a in h])
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(self_influence, torch.stack([compare(a, a) for a in h]))
    assert scores.std() > 0


def test_end_to_end() -> None:
    module, train, targets = BlobClassifier(), blobs(20), blobs(6, seed=1)
    result = quiet_trainer().attribute(
        model=module,
        method=RepresentationSimilarity("network.1", "cosine"),
        train_dataloaders=loader_of(train),
        target_dataloaders=loader_of(targets, batch_size=4),
    )
    h, z = (F.normalize(module.network[:2](x).detach()) for x in (train.tensors[0], targets.tensors[0]))
    torch.testing.assert_close(result.scores.values, h @ z.T)
    assert result.scores.provenance["scale"] == "rank_only"
    assert result.scores.provenance["layer"] == "network.1"
    assert result.scores.provenance["tokens"] == "mean"


def test_a_function_of_the_targets_is_refused() -> None:
    loader = loader_of(blobs(8))
    with pytest.raises(AttributionError, match=r"RepresentationSimilarity does not measure .* change nothing"):
        quiet_trainer().attribute(
            model=BlobClassifier(),
            method=RepresentationSimilarity(),
            train_dataloaders=loader,
            target_dataloaders=loader,
            target_function=lambda module, batch: module(batch[0]).sum(1),
        )


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"`similarity` of .+ to be 'dot', 'cosine' or 'l2', but got 'euclid'"):
        RepresentationSimilarity(similarity="euclid")
    with pytest.raises(ValueError, match=r"`tokens` of .+ to be 'mean', 'last' or 'flatten', but got 'first'"):
        RepresentationSimilarity(tokens="first")


def test_distances_of_what_is_close_keep_their_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = 100 + torch.randn(5, 64, generator=generator)
    h = torch.cat([targets, targets + 1e-3 * torch.randn(5, 64, generator=generator), 100 - targets])
    scores, own = RepresentationSimilarity(similarity="l2")._compare(h, targets)
    expected = -(h.double()[:, None] - targets.double()).square().sum(2)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-10)
    assert not own.any()
    assert RepresentationSimilarity(similarity="l2")._compare(h, targets[:0])[0].shape == (15, 0)
