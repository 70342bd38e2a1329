"""The module at a snapshot: its samples, its targets, their gradients, and what is kept beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import BlobClassifier, blobs
from lightning_attr.errors import AttributionError, CorruptedStoreError
from lightning_attr.features.snapshot_model import Replay, SnapshotModel
from lightning_attr.methods import (
    KFAC,
    RPS,
    AttributionMethod,
    Influence,
    LiSSA,
    RepresentationSimilarity,
    SnapshotFeatures,
)
from lightning_attr.parameters.weights import load_weights
from lightning_attr.projectors import IdentityProjector, MatrixProjection, NoProjection
from lightning_attr.randomness.draws import Draw

TRAIN, TARGETS = blobs(11).tensors, blobs(5, seed=1).tensors


def batches(tensors: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


def snapshot_model(size: int = 4) -> SnapshotModel:
    return SnapshotModel.of(
        BlobClassifier().double().eval(), batches(doubled(TRAIN), size), batches(doubled(TARGETS), size)
    )


def doubled(tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return tensors[0].double(), tensors[1]


def gradients(model: SnapshotModel, tensors: tuple[Tensor, Tensor]) -> Tensor:
    rows = []
    for x, y in zip(*tensors, strict=True):
        output = model.module.functional_output({}, {}, (x[None], y[None])).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(output, list(model.module.parameters()))]))
    return torch.stack(rows)


def test_gradients_are_those_of_a_loop() -> None:
    model = snapshot_model()
    identity = IdentityProjector().bind(model.layout, model.key)
    blocks = list(model.train(identity))
    assert [rows for rows, _ in blocks] == [range(4), range(4, 8), range(8, 11)]
    features = torch.cat([columns["features"] for _, columns in blocks])
    torch.testing.assert_close(features, gradients(model, doubled(TRAIN)), rtol=1e-10, atol=1e-12)
    wanted = range(3, 5)
    found = model.targets(identity, wanted)
    torch.testing.assert_close(found["features"], gradients(model, doubled(TARGETS))[3:5], rtol=1e-10, atol=1e-12)
    assert found["output"].shape == (2,)


@pytest.mark.parametrize("size", [1, 3, 11])
def test_inner_products_with_given_vectors(size: int) -> None:
    model = snapshot_model(size)
    vectors = torch.randn(3, model.layout.numel, dtype=torch.float64)
    found = torch.cat([columns["features"] for _, columns in model.train(MatrixProjection(model.layout, vectors))])
    torch.testing.assert_close(found, gradients(model, doubled(TRAIN)) @ vectors.T, rtol=1e-10, atol=1e-12)


def test_vectors_that_do_not_fit_are_refused() -> None:
    model = snapshot_model()
    with pytest.raises(ValueError, match=r"`vectors` to have the shape \(r, 67\), one row a vector, but got \(67,\)"):
        MatrixProjection(model.layout, torch.zeros(67))


def test_without_features_nothing_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = snapshot_model()
    monkeypatch.setattr(torch.autograd, "grad", None)
    columns = model.targets(NoProjection(), range(5))
    assert columns["features"].shape == (5, 0)
    expected = model.module.functional_output({}, {}, doubled(TARGETS))
    torch.testing.assert_close(columns["output"], expected)


def test_the_loss_of_the_training_set_is_a_function_of_the_parameters() -> None:
    model = snapshot_model()
    params = {name: p + 1 for name, p in model.parameters().items()}
    total = sum(model.total_loss(params, batch, len(rows)) for rows, batch in model.train_batches())
    load_weights(model.module, params)
    expected = torch.nn.functional.cross_entropy(model.module(doubled(TRAIN)[0]), TRAIN[1], reduction="sum")
    torch.testing.assert_close(total, expected)


def test_load_brings_the_weights_back() -> None:
    model = snapshot_model()
    before = {name: p.clone() for name, p in model.parameters().items()}
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(1)
    model.load()
    assert all(torch.equal(p, before[name]) for name, p in model.parameters().items())


def test_what_was_computed_is_kept(tmp_path: Path) -> None:
    model = snapshot_model()
    calls: list[int] = []

    def compute() -> dict[str, Tensor]:
        calls.append(1)
        return {"x": torch.tensor([1.0, 2.0])}

    assert model.kept("factors", compute)["x"].tolist() == [1, 2]
    object.__setattr__(model, "folder", tmp_path / "computed")
    for _ in range(3):
        assert model.kept("factors", compute)["x"].tolist() == [1, 2]
    assert len(calls) == 2  # once without a folder
    model.kept("other", compute)
    assert len(calls) == 3
    file = tmp_path / "computed" / "factors.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(
        CorruptedStoreError, match=r"factors.safetensors is .*damaged.* Delete it: it is computed again"
    ):
        model.kept("factors", compute)


def test_another_process_writes_nothing(tmp_path: Path) -> None:
    model = snapshot_model()
    object.__setattr__(model, "folder", tmp_path / "computed")
    object.__setattr__(model, "writer", False)
    assert model.kept("factors", lambda: {"x": torch.ones(1)})["x"].item() == 1
    assert not (tmp_path / "computed").exists()


def test_large_batches_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_attr.features.snapshot_model._KEPT_BYTES", 100)
    reads: list[int] = []

    def read(size: int) -> Replay:
        def batches():  # type: ignore[no-untyped-def]  # of a test
            reads.append(size)
            yield range(2), torch.ones(size)
            yield range(2, 4), torch.ones(size)

        return Replay(batches)

    for size, expected in [(12, 1), (13, 3)]:
        reads.clear()
        replay = read(size)
        for _ in range(3):
            assert [rows for rows, _ in replay()] == [range(2), range(2, 4)]
        assert len(reads) == expected


def test_batches_left_before_the_end_are_read_again() -> None:
    reads: list[int] = []

    def read():  # type: ignore[no-untyped-def]  # of a test
        reads.append(1)
        yield range(1), torch.ones(1)
        yield range(1, 2), torch.ones(1)

    replay = Replay(read)
    next(replay())
    assert len(list(replay())) == len(list(replay())) == 2
    assert len(reads) == 2


class Noisy(BlobClassifier):
    """It sees its samples with noise of their own."""

    def attribution_batch(self, batch: Any, draw: Draw) -> Any:
        return batch[0] + draw.normal(4).to(batch[0]), batch[1]


NOISY = {
    "EK-FAC": Influence(),
    "sampled labels": Influence(solver=KFAC("sampled")),
    "explicit": Influence(solver="explicit"),
    "Hessian": Influence("hessian", "explicit", weight_decay=1.0),
    "LiSSA": Influence(solver=LiSSA(iterations=3, batch_size=3), damping=5.0),
    "DataInf": Influence(solver="datainf"),
    "representations": RepresentationSimilarity(),
    "RPS": RPS(),
}


@pytest.mark.parametrize("method", NOISY.values(), ids=NOISY)
def test_methods_see_what_a_module_draws(method: AttributionMethod) -> None:
    def scores(module: Any, train: Any, targets: Any) -> Tensor:
        model = SnapshotModel.of(module.double().eval(), batches(train, 4), batches(targets, 4))
        return torch.cat([block.scores for block in method.score([SnapshotFeatures.at(model, {})])])

    train, targets = doubled(TRAIN), doubled(TARGETS)
    noisy, plain = Noisy(), BlobClassifier()
    plain.load_state_dict(noisy.state_dict())
    found = scores(noisy, train, targets)
    shifted = [(x + Draw(range(len(x)), "current").normal(4), y) for x, y in (train, targets)]
    torch.testing.assert_close(found, scores(plain, *shifted))
    assert not torch.allclose(found, scores(plain, train, targets), rtol=0.01)


@pytest.mark.parametrize("name", sorted(NOISY.keys() - {"DataInf"}))  # which only needs features
def test_several_draws_need_a_method_on_stored_features(name: str) -> None:
    noisy = Noisy().eval()
    noisy.attribution_draws = 2
    model = SnapshotModel.of(noisy, [TRAIN], [TARGETS])
    with pytest.raises(AttributionError, match=r"`attribution_draws` of Noisy to be 1, but got 2.*TRAK, TracIn"):
        list(NOISY[name].score([SnapshotFeatures.at(model, {})]))
