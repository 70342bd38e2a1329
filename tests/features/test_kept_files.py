"""What was computed once is read again only where it can be what was computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import CorruptedStoreError
from lightning_attr.features.kept_files import read_kept
from lightning_attr.files.io import read_tensors, write_tensors
from lightning_attr.methods import RPS, TRAK, Influence, KNNShapley

SHAPES = {"a/x": (2, 3), "a/y": (2,), "n": ()}
WHOLE = {"a/x": torch.ones(2, 3), "a/y": torch.ones(2, dtype=torch.float64), "n": torch.tensor(4)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a/x": torch.full((2, 3), float("nan"))}, "`a/x` holds NaN, Inf, or numbers that overflow when squared"),
        (
            {"a/x": torch.full((2, 3), -1e300, dtype=torch.float64)},
            "`a/x` holds NaN, Inf, or numbers that overflow when squared",
        ),
        ({"a/x": torch.ones(3, 2)}, r"`a/x` has the shape \(3, 2\), where \(2, 3\) belongs"),
        ({"a/y": torch.ones(2, dtype=torch.bool)}, r"`a/y` has the dtype torch\.bool"),
        ({"a/y": torch.ones(2, dtype=torch.complex64)}, r"`a/y` has the dtype torch\.complex64"),
        ({"b": torch.ones(1)}, "`b` does not belong there"),
        ({"a/x": None}, "`a/x` is missing"),
        ({"n": None}, "`n` is missing"),
    ],
)
def test_tensors_that_cannot_be_what_was_computed_are_named(tmp_path: Path, changes: Any, message: str) -> None:
    tensors = {name: tensor for name, tensor in {**WHOLE, **changes}.items() if tensor is not None}
    write_tensors(tmp_path / "kept.safetensors", tensors, {"kind": "computed"})
    with pytest.raises(CorruptedStoreError, match=rf"kept\.safetensors is damaged: {message}\. Delete it"):
        read_kept(tmp_path / "kept.safetensors", {"kind": "computed"}, SHAPES, [["a/x", "a/y"]])


def test_a_group_may_be_missing(tmp_path: Path) -> None:
    write_tensors(tmp_path / "kept.safetensors", {"n": WHOLE["n"]})
    assert set(read_kept(tmp_path / "kept.safetensors", {}, SHAPES, [["a/x", "a/y"]])) == {"n"}


@pytest.fixture(name="run", scope="module")
def run_fixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    path = tmp_path_factory.mktemp("kept") / "run"
    trainer = quiet_trainer(max_epochs=1, callbacks=[AttributionCallback(path, TRAK(8), log=False)])
    trainer.fit(BlobClassifier(), loader_of(blobs(24)))
    return trainer, path


@pytest.mark.parametrize(
    "method",
    [
        Influence(solver="ekfac"),
        Influence(solver="explicit", damping=0.1),
        KNNShapley(k=3),
        RPS(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_each_method_refuses_a_file_of_other_shapes(run: tuple[Any, Path], method: Any) -> None:
    trainer, path = run
    before = set(path.rglob("computed/*"))
    whole = trainer.attribute(method=method, targets="train").scores.values
    assert torch.equal(trainer.attribute(method=method, targets="train").scores.values, whole)
    (file,) = set(path.rglob("computed/*")) - before
    tensors, place = read_tensors(file), _metadata(file)
    for name in tensors:
        write_tensors(file, {**tensors, name: tensors[name].new_ones(*tensors[name].shape, 2)}, place)
        with pytest.raises(CorruptedStoreError, match="has the shape"):
            trainer.attribute(method=method, targets="train")
    file.unlink()
    assert torch.equal(trainer.attribute(method=method, targets="train").scores.values, whole)


def _metadata(file: Path) -> dict[str, str]:

    with safe_open(file, framework="pt") as opened:
        metadata: dict[str, str] = json.loads(opened.metadata()["lightning_attr"])
    return {key: value for key, value in metadata.items() if "sha256" not in key}
