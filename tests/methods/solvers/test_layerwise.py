"""K-FAC and EK-FAC at a snapshot: which labels, processes without samples, half precision, no mixin."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from influence_cases import Batch, N, Network, dense_curvature, gradients, network, scored, shares, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_attr.curvature import fisher
from lightning_attr.methods import EKFAC, KFAC, ConjugateGradient, Influence, SnapshotFeatures
from lightning_attr.methods.solvers import layerwise as layer_solvers
from lightning_attr.outputs import NegativeLoss


def labels_of(features: SnapshotFeatures, **settings: Any) -> tuple[Tensor, str]:
    scores, _ = scored(Influence(**settings), features)
    return scores, features.evidence["labels"]


@pytest.mark.parametrize("kind", [EKFAC, KFAC])
def test_labels_are_mixed_where_there_are_few_labels_and_many_samples(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, train, targets = network()

    def taken(**settings: Any) -> tuple[Tensor, str]:
        return labels_of(snapshot(module, train, targets), **settings)

    exact, mixed, sampled = (taken(solver=kind(labels))[0] for labels in ("exact", "mixed", "sampled"))
    assert not torch.allclose(mixed, exact, rtol=0.01)
    assert not torch.allclose(sampled, exact, rtol=0.01)
    for samples_an_output, few, labels, expected in (
        (40, 16, "exact", exact),  # 40 draws an output are more than there are labels
        (0.1, 2, "sampled", sampled),
    ):
        monkeypatch.setattr(layer_solvers, "_DRAWS_AN_OUTPUT", samples_an_output)
        monkeypatch.setattr(fisher, "_FEW_LABELS", few)
        scores, found = taken(solver=kind())
        assert found == labels
        assert torch.equal(scores, expected)
    monkeypatch.setattr(fisher, "_FEW_LABELS", 16)
    scores, found = taken(solver=kind())
    assert found == "mixed"
    assert torch.equal(scores, taken(solver=kind("mixed"))[0])
    assert not torch.equal(scores, taken(solver=kind(), seed=1)[0])
    assert taken(solver=kind(), curvature="empirical_fisher")[1] == "observed"


def test_many_draws_are_as_good_as_exact_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    module, train, targets = network()
    monkeypatch.setattr(layer_solvers, "_DRAWS_AN_OUTPUT", 400)
    exact, mixed = (
        labels_of(snapshot(module, train, targets), solver=solver)[0] for solver in (EKFAC("exact"), EKFAC("mixed"))
    )
    assert (mixed - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("labels", ["mixed", "sampled"])
def test_draws_do_not_depend_on_the_batches(labels: Any) -> None:
    module, train, targets = network()
    whole, parts = (
        scored(Influence(solver=EKFAC(labels)), snapshot(module, train, targets, size)) for size in (len(train[0]), 7)
    )
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_factors_that_are_kept_are_those_of_the_labels_taken(tmp_path: Path) -> None:
    module, train, targets = network()
    for labels, files in (("auto", 1), ("exact", 1), ("sampled", 2), ("mixed", 3)):
        scored(Influence(solver=EKFAC(labels)), snapshot(module, train, targets, folder=tmp_path))
        assert len(list(tmp_path.iterdir())) == files


def test_a_process_without_samples() -> None:
    module, train, targets = network()
    expected = scored(Influence(), snapshot(module, train, targets, 8))
    parts, blocks = shares(module, train, targets, [[0, 1, 2], []], 8), {}

    def run(rank: int) -> None:
        blocks[rank] = list(Influence().score([parts[rank]]))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert blocks[1] == []
    torch.testing.assert_close(torch.cat([block.scores for block in blocks[0]]), expected[0])
    assert parts[0].evidence["labels"] == "exact"


# Half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [EKFAC(), KFAC("sampled"), ConjugateGradient(200, 1e-6), "datainf", "explicit"], ids=str
)
def test_half_precision_gives_almost_the_same(solver: Any) -> None:
    module, train, targets = network(torch.float32)
    expected, own = scored(Influence(solver=solver), snapshot(module, train, targets))
    half = snapshot(module, train, targets, precision=lambda: torch.autocast("cpu", torch.bfloat16))
    found, found_own = scored(Influence(solver=solver), half)
    assert found.dtype == found_own.dtype == torch.float32
    for a, b in ((found, expected), (found_own, own)):
        error = (a - b).norm() / b.norm()
        assert 1e-5 < error < 0.05  # it was in half precision, and hardly mattered


# Without the mixin ------------------------------------------------------------------------------------------------


class Bare(L.LightningModule):
    """The training loss is what is attributed; the parameters are those of a `Network`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*Network())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layers(batch[0]), batch[1])


class Same(Network):
    model_output = NegativeLoss(lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"))


@pytest.mark.parametrize(
    ("curvature", "solver"),
    [("empirical_fisher", "ekfac"), ("empirical_fisher", "kfac"), ("hessian", "explicit"), ("hessian", "cg")],
)
def test_a_module_without_the_mixin_is_one_whose_output_is_minus_its_loss(curvature: str, solver: str) -> None:
    _, train, targets = network()
    method = Influence(curvature, solver, damping=0.5, weight_decay=3.0)
    expected = scored(method, snapshot(Same().double(), train, targets))
    found = scored(method, snapshot(Bare().double(), train, targets))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_hessian_of_a_training_step() -> None:
    _, train, targets = network()
    module, same = Bare().double(), Same().double()
    hessian = dense_curvature(same, "hessian", train) + 3 * torch.eye(43).double()
    g, u = (gradients(module, lambda b: module.training_step(b, 0), data) for data in (train, targets))
    scores, own = scored(
        Influence("hessian", "explicit", damping=0.0, weight_decay=3.0), snapshot(module, train, targets)
    )
    torch.testing.assert_close(scores, g @ torch.linalg.solve(hessian, u.T) / N)
    torch.testing.assert_close(own, (g * torch.linalg.solve(hessian, g.T).T).sum(1) / N)


@pytest.mark.parametrize("labels", ["auto", "exact", "mixed", "sampled"])
def test_labels_of_the_model_need_the_mixin(labels: Any) -> None:
    _, train, targets = network()
    with pytest.raises(TypeError, match=r"Expected Bare to have lightning_attr.AttributionMixin among its bases"):
        scored(Influence(solver=EKFAC(labels)), snapshot(Bare().double(), train, targets))
