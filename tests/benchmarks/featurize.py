"""What featurizing costs, as a multiple of a plain forward and backward pass over the same samples, in one run.

Run `python tests/benchmarks/featurize.py [--json FILE] [--repeats N] [--device cuda]`. A ratio is the median over the
repeats of a row's time divided by that of the plain pass, or of vmap(grad), next to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digits import cnn, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_attr import AttributionMixin
from lightning_attr.featurizer import Featurizer, plan
from lightning_attr.gradients import vmap_gradients
from lightning_attr.layout import ParameterLayout
from lightning_attr.projectors import KroneckerProjector, RademacherProjector

VOCABULARY, LENGTH, WIDTH = 128, 64, 192


class Classifier(AttributionMixin, nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]  # torch types a module's call as Any


class Block(nn.Module):
    """Pre-norm transformer block with 6 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        b, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, length, 3, 6, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, length, width))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Four blocks over 64 tokens, classifying by the last: 1.9M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        x = self.blocks(self.tokens(ids) + self.positions(positions))
        return self.head(self.norm(x[:, -1]))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Work:
    """A network, its inputs, the batch size, and how many batches are timed together."""

    network: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch_size: int
    batches: int


WORK = {
    "digits MLP, 17k parameters": Work(mlp, lambda n: torch.rand(n, 64), batch_size=64, batches=8),
    "digits CNN, 10k parameters": Work(cnn, lambda n: torch.rand(n, 1, 8, 8), batch_size=64, batches=4),
    "transformer, 1.8M parameters, 64 tokens": Work(
        Transformer, lambda n: torch.randint(VOCABULARY, (n, LENGTH)), batch_size=32, batches=1
    ),
}


def passes(work: Work, device: str) -> dict[str, Callable[[], None]]:
    """The plain pass first, then what is compared with it; each goes over the same batches."""
    torch.manual_seed(0)
    module = Classifier(work.network()).to(device).eval()
    batches = [
        (work.inputs(work.batch_size).to(device), torch.randint(10, (work.batch_size,), device=device))
        for _ in range(work.batches)
    ]
    params = {name: p.detach() for name, p in module.named_parameters()}
    rows = list(range(work.batch_size))
    layout, path = ParameterLayout.of(module), plan(module, tuple(t[:4] for t in batches[0]), 4)

    def plain() -> None:
        for x, y in batches:
            module.zero_grad()
            F.cross_entropy(module(x), y).backward()

    def featurize(projector: Any) -> Callable[[], None]:
        featurizer = Featurizer(module, path, projector.bind(layout, "final"))

        def run() -> None:
            for batch in batches:
                featurizer(batch, rows)

        return run

    def vmap() -> None:
        for batch in batches:
            vmap_gradients(lambda p, b: module.functional_output(p, {}, b), params, batch, work.batch_size)

    return {
        "plain forward and backward": plain,
        "featurized, Kronecker, proj_dim 2048 (the default)": featurize(KroneckerProjector(2048)),
        "featurized, Rademacher, proj_dim 512": featurize(RademacherProjector(512)),
        "vmap(grad), gradients only": vmap,
    }


def seconds(run: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print(
        f"{arguments.device}, {arguments.threads} thread(s), torch {torch.__version__}, median of {arguments.repeats}"
    )
    print(f"{'':46}{'samples/s':>11}{'/ plain':>9}{'/ vmap':>9}")
    rows: list[dict[str, Any]] = []
    for name, work in WORK.items():
        runs = passes(work, arguments.device)
        for run in runs.values():
            run()  # warm-up: draws the projections
        times = [{what: seconds(run, arguments.device) for what, run in runs.items()} for _ in range(arguments.repeats)]
        plain, *_, vmap = runs
        print(name)
        for what in runs:
            figure = statistics.median(t[what] for t in times)
            to_plain = statistics.median(t[what] / t[plain] for t in times)
            to_vmap = statistics.median(t[what] / t[vmap] for t in times)
            samples = work.batch_size * work.batches / figure
            print(f"  {what:44.44}{samples:11,.0f}{to_plain:9.2f}{to_vmap:9.2f}")
            rows.append({
                "what": f"{name}: {what}",
                "figure": figure,
                "reference": statistics.median(t[plain] for t in times),
                "ratio": to_plain,
                "ratio_to_vmap": to_vmap,
                "threads": arguments.threads,
            })
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
