"""What our low-level functions cost beside dattri's, for the same work, as ratios of processor seconds.

    python tests/benchmarks/func.py [--quick] [--repeats 7] [--vectors 20] [--threads 1] [--json FILE]

The work: an MLP 64-32-10 on 500 samples, 20 right-hand sides, float32. Both sides get the same number of Hessian
products, iterations and batches, the same damping, and the result of each is compared with ours before it is timed.
Each row alternates between the two, and its ratio is the median over the repeats; below 1 ours is faster. "one place"
times the functions with `at_x`, whose preparation is made before for both; the others prepare in every call.
dattri draws batches of its own for every right-hand side of LiSSA, ours share them. It differentiates in all arguments,
so that data are arguments only for LiSSA, which draws batches from them, and labels are one-hot there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dattri.func import hessian as peer
from torch import Tensor
from torch.nn import functional as F

from lightning_attr import func as ours

DAMPING = 1.0  # above every negative eigenvalue of these untrained weights
SCALE = 20.0


class Work(NamedTuple):
    """A point, its data and right-hand sides."""

    theta: Tensor
    x: Tensor
    y: Tensor
    vectors: Tensor


def work(vectors: int) -> Work:
    torch.manual_seed(0)
    size = 64 * 32 + 32 + 32 * 10 + 10
    return Work(0.1 * torch.randn(size), torch.randn(500, 64), torch.randint(10, (500,)), torch.randn(vectors, size))


def data_loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross entropy of an MLP whose parameters come as one vector, as dattri wants them."""
    w, b, v, c = theta.split([64 * 32, 32, 32 * 10, 10])
    return F.cross_entropy(F.linear(F.relu(F.linear(x, w.view(32, 64), b)), v.view(10, 32), c), y)


class Row(NamedTuple):
    """Two ways to one result; each takes right-hand sides."""

    name: str
    ours: Callable[[Tensor], Any]
    peer: Callable[[Tensor], Any]
    close: float | None  # relative difference allowed; None where the two are different estimates


def rows(job: Work) -> list[Row]:
    """What is measured."""
    x, data = (job.theta,), (job.theta, job.x, F.one_hot(job.y, 10).float())
    first = job.vectors[0]

    def loss(theta: Tensor) -> Tensor:
        return data_loss(theta, job.x, job.y)

    in_turn = torch.func.vmap
    damped = {"damping": DAMPING}
    regular = {"regularization": DAMPING}
    cg, peer_cg = {"tolerance": 0.0, "max_iterations": 10}, {"max_iter": 10}
    lissa = {"scale": SCALE, "iterations": 50, "batch_size": 64}
    peer_lissa = {"scaling": SCALE, "damping": DAMPING / SCALE, "recursion_depth": 50}
    arnoldi, peer_arnoldi = {"iterations": 50, "top_k": 20}, {"max_iter": 51, "top_k": 20, "regularization": 0.0}
    our_hvp, peer_hvp = ours.hvp(loss), peer.hvp(loss)
    our_at, peer_at = ours.hvp_at_x(loss, x), peer.hvp_at_x(loss, x)
    return [
        Row("hvp, one vector", lambda v: our_hvp(x, first), lambda v: peer_hvp(x, first), 1e-3),
        Row("hvp", lambda v: our_hvp(x, v), lambda v: in_turn(lambda one: peer_hvp(x, one))(v), 1e-3),
        Row("hvp, one vector, one place", lambda v: our_at(first), lambda v: peer_at(first), 1e-3),
        Row("hvp, one place", our_at, in_turn(peer_at), 1e-3),
        Row(
            "ihvp_explicit",
            lambda v: ours.ihvp_explicit(loss, **damped)(x, v),
            lambda v: peer.ihvp_explicit(loss, **regular)(x, v),
            0.1,
        ),
        Row(
            "ihvp_explicit, one place",
            ours.ihvp_at_x_explicit(loss, *x, **damped),
            peer.ihvp_at_x_explicit(loss, *x, **regular),
            0.1,
        ),
        Row(
            "ihvp_cg, 10 iterations",
            lambda v: ours.ihvp_cg(loss, **damped, **cg)(x, v),
            lambda v: peer.ihvp_cg(loss, **regular, **peer_cg)(x, v),
            0.5,
        ),
        Row(
            "ihvp_cg, 10 iterations, one place",
            ours.ihvp_at_x_cg(loss, *x, **damped, **cg),
            peer.ihvp_at_x_cg(loss, *x, **regular, **peer_cg),
            0.5,
        ),
        Row(
            "ihvp_lissa, 50 iterations of batches of 64",
            lambda v: ours.ihvp_lissa(data_loss, **damped, **lissa)(data, v),
            lambda v: peer.ihvp_lissa(data_loss, batch_size=64, **peer_lissa)(data, v, in_dims=(None, 0, 0)),
            None,
        ),
        Row(
            "ihvp_lissa, 50 iterations of all samples",
            lambda v: ours.ihvp_lissa(data_loss, **damped, scale=SCALE, iterations=50)(data, v),
            lambda v: peer.ihvp_lissa(data_loss, batch_size=500, **peer_lissa)(data, v, in_dims=(None, 0, 0)),
            1e-3,
        ),
        Row(
            "ihvp_arnoldi, 50 products, top 20",
            lambda v: ours.ihvp_arnoldi(loss, **arnoldi)(x, v),
            lambda v: peer.ihvp_at_x_arnoldi(loss, *x, **peer_arnoldi)(v),
            None,
        ),
    ]


def seconds(run: Callable[[Tensor], Any], vectors: Tensor, passes: int) -> float:
    """Processor time of one call, the mean of several: other programs must not count."""
    start = time.process_time()
    for _ in range(passes):
        run(vectors)
    return (time.process_time() - start) / passes


def measure(row: Row, job: Work, repeats: int) -> dict[str, Any]:
    """Compare the results, then the times."""
    found, expected = row.ours(job.vectors), row.peer(job.vectors.clone())
    difference = ((found - expected).norm() / expected.norm()).item()
    if row.close is not None and not difference <= row.close:
        raise RuntimeError(f"{row.name}: the two results differ by {difference:.3g}")
    passes = max(1, min(50, int(0.05 / max(seconds(row.ours, job.vectors, 1), 1e-6))))
    pairs = [(seconds(row.ours, job.vectors, passes), seconds(row.peer, job.vectors, passes)) for _ in range(repeats)]
    return {
        "what": row.name,
        "figure": statistics.median(mine for mine, _ in pairs),
        "reference": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(mine / theirs for mine, theirs in pairs),
        "difference": difference,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 repeats")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--vectors", type=int, default=20, help="right-hand sides")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="only rows whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    settings = parser.parse_args()
    repeats = 3 if settings.quick else settings.repeats
    torch.set_num_threads(settings.threads)

    print(
        f"cpu, {settings.threads} thread(s), torch {torch.__version__}, {settings.vectors} vectors, {repeats} repeats"
    )
    print(f"{'':46}{'ours, ms':>11}{'dattri, ms':>12}{'ratio':>8}{'difference':>12}")
    job = work(settings.vectors)
    results = []
    for row in rows(job):
        if settings.only and settings.only not in row.name:
            continue
        result = measure(row, job, repeats)
        figures = f"{1e3 * result['figure']:11.2f}{1e3 * result['reference']:12.2f}{result['ratio']:8.2f}"
        print(f"  {row.name:44}{figures}{result['difference']:12.1e}", flush=True)
        results.append(result)
    if settings.json:
        settings.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
