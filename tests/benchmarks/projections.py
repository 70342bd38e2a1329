"""What a projection loses: scores from projected gradients beside those of TRAK(exact=True), which projects nothing.

    python tests/benchmarks/projections.py [--mnist FOLDER] [--plot FILE] [--json FILE]

trains an MLP 784-128-64-10 (109,000 parameters) for three epochs on 5,000 MNIST images (`t10k-*.gz` of FOLDER; without
it a smaller MLP on scikit-learn's digits), and prints for each projector the mean correlation of a target's scores with
the exact ones, and processor seconds on one thread for learning the projection and for featurizing the training set.
With `--plot FILE` the MLP has 32 to 1,024 units in its first layer, and the file shows the correlation by its size.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_attr import AttributionMixin
from lightning_attr.features.learned_projection import learn_from
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods import TRAK, SnapshotFeatures
from lightning_attr.projectors import (
    EigenProjector,
    KroneckerProjector,
    LearnedProjection,
    Projector,
    RademacherProjector,
)
from lightning_attr.randomness.draws import Samples

WIDTHS = (32, 64, 128, 256, 512, 1024)
BY_WIDTH: list[Projector] = [KroneckerProjector(2048), *(EigenProjector(k) for k in (512, 1024, 2048))]
PROJECTORS: list[Projector] = [
    *(KroneckerProjector(k) for k in (512, 2048)),
    RademacherProjector(512),
    *(EigenProjector(k) for k in (256, 512, 1024, 2048)),
]


class Classifier(AttributionMixin, nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(*(
            nn.Linear(size, width),
            nn.ReLU(),
            nn.Linear(width, width // 2),
            nn.ReLU(),
            nn.Linear(width // 2, 10),
        ))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def data(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Images in rows, and labels."""
    if folder is None:
        x, y = load_digits(return_X_y=True)
        return torch.from_numpy(x).float() / 16, torch.from_numpy(y).long()
    images, labels = (
        torch.from_numpy(np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=offset).copy())
        for name, offset in (("t10k-images-idx3-ubyte.gz", 16), ("t10k-labels-idx1-ubyte.gz", 8))
    )
    return images.reshape(-1, 784).float() / 255, labels.long()


def trained(x: Tensor, y: Tensor, width: int) -> Classifier:
    torch.manual_seed(0)
    module = Classifier(x.shape[1], width)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(module(x[batch]), y[batch]).backward()
            optimizer.step()
    return module.eval()


def correlation(found: Tensor, exact: Tensor) -> float:
    """Mean over targets, the columns."""
    found, exact = (scores.double() - scores.double().mean(0) for scores in (found, exact))
    return F.cosine_similarity(found, exact, dim=0).mean().item()


def row(projector: Projector, model: SnapshotModel, x: Tensor, y: Tensor, exact: Tensor, m: int) -> dict[str, Any]:
    projection = projector.bind(model.layout, model.key)
    begin = time.process_time()
    if isinstance(projection, LearnedProjection):
        samples = Samples(len(x), lambda rows: iter([(rows, (x[list(rows)], y[list(rows)]))]))
        learn_from(projection, model.module, model.plan, samples, model.key, model.precision)
    learning = time.process_time() - begin
    begin = time.process_time()
    blocks = [columns for _, columns in model.train(projection)]
    featurizing = time.process_time() - begin
    train = {name: torch.cat([columns[name] for columns in blocks]) for name in blocks[0]}
    snapshot = SnapshotFeatures.of(train, model.targets(projection, range(m)))
    scores = torch.cat([block.scores for block in TRAK(projector=projector).score([snapshot])])
    name = f"{type(projector).__name__}({projector.proj_dim})"
    return {"projector": name, "correlation": correlation(scores, exact), "learning": learning, "s": featurizing}


def compare(x: Tensor, y: Tensor, n: int, m: int, width: int, projectors: list[Projector]) -> list[dict[str, Any]]:
    """Train on the first n, take the next m for targets; a row a projector."""
    module = trained(x[:n], y[:n], width)
    batches = [(x[:n][part], y[:n][part]) for part in torch.arange(n).split(250)]
    model = SnapshotModel.of(module, batches, [(x[n : n + m], y[n : n + m])])
    method = TRAK(exact=True)
    columns = model.targets(method.bind(model.layout, model.key), range(m))
    beside = {name: values for name, values in columns.items() if name != "features"}
    exact = torch.cat([block.scores for block in method.score([SnapshotFeatures.at(model, beside)])])
    print(f"{model.layout.numel:,} parameters, {n:,} training samples, {m} targets; with TRAK(exact=True):")
    rows = []
    for projector in projectors:
        found = row(projector, model, x[:n], y[:n], exact, m) | {"parameters": model.layout.numel}
        print(
            f"{found['projector']:26} {found['correlation']:.3f}  {found['learning']:6.2f} s  {found['s']:6.2f} s",
            flush=True,
        )
        rows.append(found)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A line a projector."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(found["projector"] for found in rows):
        own = [found for found in rows if found["projector"] == name]
        axes.plot([f["parameters"] for f in own], [f["correlation"] for f in own], "o-", label=name)
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="parameters", ylabel="correlation with TRAK(exact=True)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = data(options.mnist)
    n, m = (5000, 300) if options.mnist else (1437, 300)
    widths, projectors = (WIDTHS, BY_WIDTH) if options.plot else ((128,), PROJECTORS)
    rows = [found for width in widths for found in compare(x, y, n, m, width, projectors)]
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        options.json.write_text("".join(json.dumps(found) + "\n" for found in rows), "utf-8")


if __name__ == "__main__":
    main()
