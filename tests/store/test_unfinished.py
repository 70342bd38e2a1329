"""What a killed run left of a snapshot: written again where nothing else is there, else set aside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_attr import FeatureStore
from lightning_attr.store.manifest import Fingerprint

FINGERPRINT = Fingerprint(23, "abc", {"w": (2,)}, {"kind": "identity"})


@pytest.mark.parametrize(
    ("left", "moved"),
    [
        ([".weights.safetensors.7474.tmp"], False),
        (["weights.safetensors"], False),
        (["weights.safetensors", "frozen.safetensors", "optimizer.safetensors", ".tmpAbCdEf"], False),
        (["weights.safetensors", "features/00000.safetensors"], True),
        (["notes.txt"], True),
        (["features/weights.safetensors"], True),
    ],
    ids=str,
)
def test_what_a_killed_run_left_of_a_snapshot(tmp_path: Path, left: list[str], moved: bool) -> None:
    store = FeatureStore.create(tmp_path, FINGERPRINT)
    folder = tmp_path / "snapshots" / "epoch=0"
    for name in left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"half")
    store.add_snapshot("epoch=0", {"w": torch.ones(2)}, epoch=0, global_step=1, learning_rate=0.1)
    assert [file.name for file in folder.iterdir()] == ["weights.safetensors"]
    assert FeatureStore.open(tmp_path).weights("epoch=0")["w"].tolist() == [1, 1]
    kept = [name for name in left if (tmp_path / "abandoned" / "epoch=0" / name).exists()]
    assert kept == (left if moved else [])
    assert (tmp_path / "abandoned").exists() == moved
