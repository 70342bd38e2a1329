from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import images
import numpy as np
import pytest
import torch
from data import MissingDataError
from torch.utils.data import TensorDataset

RANDOM = np.random.default_rng(0)


def write_idx(path: Path, values: np.ndarray) -> None:
    content = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, suffix: str = "", n: int = 7) -> dict[str, np.ndarray]:
    written = {}
    for part in ("train", "t10k"):
        written[f"{part}-images"] = RANDOM.integers(0, 256, (n, 28, 28), np.uint8)
        written[f"{part}-labels"] = RANDOM.integers(0, 10, n, np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", written[f"{part}-images"])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", written[f"{part}-labels"])
    return written


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inner", [".", "MNIST/raw"])
def test_mnist_is_read_from_its_official_files(tmp_path: Path, suffix: str, inner: str) -> None:
    written = write_mnist(tmp_path / inner, suffix)
    for dataset, part in zip(images.mnist(tmp_path), ("train", "t10k"), strict=True):
        x, y = dataset.tensors
        assert (x.shape, x.dtype, y.dtype) == ((7, 1, 28, 28), torch.uint8, torch.int64)
        assert np.array_equal(x.numpy()[:, 0], written[f"{part}-images"])
        assert np.array_equal(y.numpy(), written[f"{part}-labels"])


def test_missing_mnist_says_where_it_is_and_how_it_lies(tmp_path: Path) -> None:
    with pytest.raises(
        MissingDataError, match=r"no train-images-idx3-ubyte or .*\.gz there\. Put the four files .*http"
    ):
        images.mnist(tmp_path)
    with pytest.raises(MissingDataError, match="there is no such folder"):
        images.mnist(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "to be an IDX file of bytes, but it starts with b''"),
        (b"<html>", "to be an IDX file of bytes"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "to be an IDX file of bytes"),
        (b"\0\0\x08\x03\0\0", "to be an IDX file of bytes"),
        (b"\0\0\x08\x01\0\0\0\x03ab", r"to hold 3 values, of shape \(3,\), but it holds 2"),
    ],
)
def test_broken_idx_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name} {message}"):
        images.read_idx(path)


@pytest.mark.parametrize("damage", [lambda packed: packed[:-12], lambda packed: b"no" + packed, lambda packed: b""])
def test_broken_gzip_files_are_named(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(damage(gzip.compress(b"\0\0\x08\x01" + bytes(500))))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"labels\.gz to be "):
        images.read_idx(path)


def test_labels_in_the_place_of_images_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros(7, np.uint8))
    with pytest.raises(ValueError, match=r"to have 3 dimensions, but got shape \(7,\)"):
        images.mnist(tmp_path)


def cifar_batch(n: int, text: bool = False) -> dict[str | bytes, object]:
    names = ("data", "labels") if text else (b"data", b"labels")
    values = RANDOM.integers(0, 256, (n, 3072), np.uint8), RANDOM.integers(0, 10, n).tolist()
    return dict(zip(names, values, strict=True))


def write_cifar(folder: Path, n: int = 20) -> dict[str, dict[str | bytes, object]]:
    folder.mkdir(parents=True, exist_ok=True)
    batches = {name: cifar_batch(n) for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")}
    for name, batch in batches.items():
        # The official files come from an old numpy, which had the function at another place.
        packed = pickle.dumps(batch, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (folder / name).write_bytes(packed)
    return batches


@pytest.mark.parametrize("inner", [".", "cifar-10-batches-py"])
def test_cifar10_is_read_from_its_python_batches(tmp_path: Path, inner: str) -> None:
    batches = write_cifar(tmp_path / inner)
    train, test = images.cifar10(tmp_path)
    assert (train.tensors[0].shape, test.tensors[0].shape) == ((100, 3, 32, 32), (20, 3, 32, 32))
    assert train.tensors[0].dtype == torch.uint8
    third = batches["data_batch_3"]
    assert np.array_equal(train.tensors[0][40:60].reshape(20, -1).numpy(), third[b"data"])
    assert train.tensors[1][40:60].tolist() == third[b"labels"]
    assert test.tensors[1].tolist() == batches["test_batch"][b"labels"]


def test_cifar2_keeps_cats_and_dogs_in_order(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    (x, y), (x2, y2) = (
        dataset.tensors for dataset in (images.cifar10(tmp_path)[0], images.cifar10(tmp_path, (3, 5))[0])
    )
    kept = [i for i in range(len(y)) if int(y[i]) in {3, 5}]
    assert torch.equal(x2, x[kept])
    assert y2.tolist() == [{3: 0, 5: 1}[int(y[i])] for i in kept]
    assert y2.unique().tolist() == [0, 1]


def test_a_batch_with_text_keys_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(pickle.dumps(cifar_batch(2, text=True)))
    assert images.read_cifar_batch(tmp_path / "batch")[0].shape == (2, 3, 32, 32)


class Harm:
    def __reduce__(self) -> object:
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "reading failed"),
        (b"<html></html>", "reading failed"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8)}), "reading failed"),
        (pickle.dumps([1, 2]), "reading failed"),
        (pickle.dumps(Harm()), r"reading failed \(it asks for builtins\.exec\)"),
        (
            pickle.dumps({b"data": np.zeros((2, 3), np.uint8), b"labels": [0, 1]}),
            r"shape \(2, 3072\).*got uint8.*\(2, 3\)",
        ),
        (pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}), "got float64"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}), r"shape \(1, 3072\)"),
    ],
)
def test_broken_cifar_batches_are_named_and_never_run(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_1 to .*{message}"):
        images.read_cifar_batch(tmp_path / "data_batch_1")


def test_missing_cifar_says_where_it_is_and_how_it_lies(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(MissingDataError, match=r"no data_batch_4 there\. Unpack https://www\.cs\.toronto\.edu"):
        images.cifar10(tmp_path)


def test_normalised_is_what_torchvision_computes() -> None:
    x, y = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2), torch.tensor([1, 0])
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    found, labels = images.Normalised(mean, std)(TensorDataset(x, y)).tensors
    for n, channel in np.ndindex(2, 3):
        expected = (x[n, channel].numpy() / 255 - mean[channel]) / std[channel]
        np.testing.assert_allclose(found[n, channel].numpy(), expected, atol=1e-6)
    assert (found.dtype, labels.tolist()) == (torch.float32, [1, 0])


def test_random_flips_mirror_about_half_of_the_images() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    flips = images.RandomFlips(TensorDataset(x, torch.tensor([4])))
    views = [flips[0][0] for _ in range(200)]
    mirrored = sum(torch.equal(view, x[0].flip(-1)) for view in views)
    assert mirrored + sum(torch.equal(view, x[0]) for view in views) == 200
    assert 60 < mirrored < 140
    assert (len(flips), int(flips[0][1])) == (1, 4)
