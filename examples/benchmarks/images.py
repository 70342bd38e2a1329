"""MNIST and CIFAR-10 from their official files, as uint8 ``(n, c, h, w)`` and int64 labels ``(n,)``."""

from __future__ import annotations

import gzip
import pickle
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import Pair, find
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

MNIST_ADVICE = (
    "Put the four files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte there, packed (.gz) or not, from https://ossci-datasets.s3.amazonaws.com/mnist/. With "
    "torchvision: `python -c \"from torchvision.datasets import MNIST; MNIST('DIR', download=True)\"` and "
    "`--data DIR`. To try the command without data: `--stand-in`."
)
CIFAR_ADVICE = (
    "Unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz there, so that it holds cifar-10-batches-py/ with "
    'data_batch_1 to data_batch_5 and test_batch. With torchvision: `python -c "from torchvision.datasets import '
    "CIFAR10; CIFAR10('DIR', download=True)\"` and `--data DIR`. To try the command without data: `--stand-in`."
)


def mnist(folder: Path) -> Pair:
    """60,000 training and 10,000 test images of 28 x 28, from the IDX files in the folder or in its ``MNIST/raw``."""
    raw = folder / "MNIST" / "raw"
    folder = raw if raw.is_dir() else folder
    train, test = (
        TensorDataset(
            *(_idx(folder, f"{part}-{kind}", dimensions) for kind, dimensions in (("images", 3), ("labels", 1)))
        )
        for part in ("train", "t10k")
    )
    return train, test


def _idx(folder: Path, name: str, dimensions: int) -> Tensor:
    stem = f"{name}-idx{dimensions}-ubyte"
    path = find(folder, [stem, f"{stem}.gz"], MNIST_ADVICE)
    values = read_idx(path)
    if values.ndim != dimensions:
        raise ValueError(f"Expected {path} to have {dimensions} dimensions, but got shape {tuple(values.shape)}.")
    return values.unsqueeze(1) if dimensions == 3 else values.long()


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of bytes: 0, 0, type, number of dimensions, the dimensions as big-endian uint32, the values.

    Raises:
        ValueError: if the file is none, or is cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"Expected {path} to be a gzip file, but it is broken ({error}). Download it again.") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"Expected {path} to be an IDX file of bytes, but it starts with {content[:4]!r}.")
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if values.size != np.prod(shape):
        raise ValueError(
            f"Expected {path} to hold {np.prod(shape)} values, of shape {shape}, but it holds {values.size}. Download "
            "it again."
        )
    return torch.from_numpy(values.reshape(shape).copy())


def cifar10(folder: Path, classes: Sequence[int] | None = None) -> Pair:
    """50,000 training and 10,000 test images of 32 x 32 in colour, or those of some classes, relabelled in order."""
    inner = folder / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else folder
    train = [read_cifar_batch(find(folder, [f"data_batch_{k}"], CIFAR_ADVICE)) for k in range(1, 6)]
    test = read_cifar_batch(find(folder, ["test_batch"], CIFAR_ADVICE))
    joined = [torch.cat(parts) for parts in zip(*train, strict=True)]
    return keep_classes(TensorDataset(*joined), classes), keep_classes(TensorDataset(*test), classes)


def keep_classes(dataset: TensorDataset, classes: Sequence[int] | None) -> TensorDataset:
    """Keep some classes and number them 0, 1, ... in the order given."""
    if classes is None:
        return dataset
    x, y = dataset.tensors
    member = y.unsqueeze(1) == torch.tensor(classes)
    kept = member.any(1)
    return TensorDataset(x[kept], member[kept].int().argmax(1))


def read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Read a batch of CIFAR's Python version: images ``(n, 3, 32, 32)`` uint8 and labels ``(n,)`` int64.

    Raises:
        ValueError: if the file is none.
    """
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        images, labels = np.asarray(batch["data"]), torch.tensor(batch["labels"], dtype=torch.int64)
    # A broken pickle raises almost anything.
    except Exception as error:
        raise ValueError(
            f"Expected {path} to be a batch of CIFAR's Python version, but reading failed ({error}). Download it again."
        ) from error
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape != (len(labels), 3072):
        raise ValueError(
            f"Expected {path} to hold uint8 images of shape ({len(labels)}, 3072), one a label, but got "
            f"{images.dtype} of shape {images.shape}."
        )
    return torch.from_numpy(images.reshape(-1, 3, 32, 32).copy()), labels


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays, lists and strings; a file from the network must not run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            return np.empty(0).__reduce__()[0]  # numpy has moved it
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class Normalised:
    """uint8 images to float32 with mean 0 and standard deviation 1 over the real data, channel by channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, dataset: TensorDataset) -> TensorDataset:
        x, y = dataset.tensors
        return TensorDataset((x / 255 - self.mean) / self.std, y)


class RandomFlips(Dataset[Any]):
    """Mirrors every second image, at random, each time it is read."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.dataset[index]
        return (x.flip(-1) if torch.rand(()) < 0.5 else x), y
