"""What featurizing costs, in time and memory, as multiples of a plain forward and backward pass over the same samples.

Run `python tests/benchmarks/featurize.py [--quick] [--no-peers] [--work resnet9 mlp ...] [--json FILE] [--device D]`.

Each row runs in a process of its own and alternates with the plain pass there: its time is the median over the repeats
of the ratio to the plain pass next to it. What can be made beforehand (plans, projections, compiled code, stores) is
made before, and a first pass is not counted. Its memory is the highest resident size (on CUDA: allocated memory) while
it is made once more and runs once, over that with only network and batch there, so that projection matrices count.
A row that takes too long is killed, and shown as "> bound".
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from networks import WORKS, Job, Work
from peers import PEERS, Maker
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_attr import AttributionMixin
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.gradients import vmap_gradients
from lightning_attr.modalities.diffusion import DiffusionMixin
from lightning_attr.objectives.objective import completed
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import (
    FactGraSSProjector,
    FactoredSJLTProjector,
    GraSSProjector,
    KroneckerProjector,
    Projector,
    RademacherProjector,
)
from lightning_attr.randomness.draws import Draw

TRANSFORMER_ONLY = "transformer"  # dense and sparse projections are compared on one work
SETUP_LIMIT = 240  # seconds; dattri compiles C++


class Classifier(AttributionMixin, nn.Module):
    """A batch is (*inputs, labels)."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.network, self.model_output = job.network, job.model_output

    def attribution_step(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.network(*batch[:-1]), batch[-1]


class Denoiser(DiffusionMixin, nn.Module):
    """A batch is (clean samples, states of a caption if there are any, labels without a meaning)."""

    attribution_draws = 1

    def __init__(self, job: Job) -> None:
        from diffusers import DDPMScheduler

        super().__init__()
        self.model, self.scheduler = job.network, DDPMScheduler()

    def conditioning(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": batch[1]} if len(batch) > 2 else {}


def module_of(job: Job) -> Any:
    """The network as it is attributed."""
    return (Denoiser(job) if job.model_output is None else Classifier(job)).eval()


def plain(job: Job) -> Callable[[], None]:
    """A forward and a backward pass that gives the gradient of every parameter, with one draw of noise if need be."""
    denoiser = Denoiser(job) if job.model_output is None else None

    def loss() -> Tensor:
        if denoiser is not None:
            return denoiser.denoising_loss((*job.inputs, job.labels))
        return F.cross_entropy(job.network(*job.inputs).flatten(0, -2), job.labels.flatten())

    def run() -> None:
        job.network.zero_grad()
        loss().backward()

    return run


def ours(projector: Projector) -> Maker:
    """What the callback does with a batch, but for writing it."""

    def make(job: Job) -> Callable[[], Any]:
        module, batch = module_of(job), (*job.inputs, job.labels)
        path = plan(module, tuple(x[:4] for x in batch), 4)
        featurizer = Featurizer(module, path, projector.bind(ParameterLayout.of(module), "final"))
        rows = list(range(job.batch_size))
        return lambda: featurizer(batch, rows)

    return make


def vmap(job: Job) -> Callable[[], Any]:
    """The usual way to per-sample gradients, not projected."""
    module = module_of(job)
    batch = completed(module, (*job.inputs, job.labels), Draw(range(job.batch_size), device=job.device))
    params = {name: p.detach() for name, p in module.named_parameters()}
    return lambda: vmap_gradients(lambda p, b: module.functional_output(p, {}, b), params, batch, job.batch_size)


def rows_of(key: str, peers: bool) -> dict[str, Maker]:
    """What is measured beside the plain pass."""
    rows: dict[str, Maker] = {"ours, Kronecker, proj_dim 2048": ours(KroneckerProjector(2048))}
    if key == TRANSFORMER_ONLY:
        rows["ours, Rademacher, proj_dim 512"] = ours(RademacherProjector(512))
        rows["ours, factored SJLT, proj_dim 2048"] = ours(FactoredSJLTProjector(2048))
        rows["ours, GraSS, proj_dim 2048"] = ours(GraSSProjector(2048))
        rows["ours, FactGraSS, proj_dim 2048"] = ours(FactGraSSProjector(2048))
    rows["vmap(grad), gradients only"] = vmap
    classifies = WORKS[key].length is None and not WORKS[key].denoises  # what peers are set up for
    return rows | PEERS if peers and classifies else rows


def seconds(run: Callable[[], Any], device: str, passes: int) -> float:
    """Time of one pass, the mean of several."""
    start = time.perf_counter()
    for _ in range(passes):
        run()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / passes


def resident(field: str) -> int:
    """VmRSS or VmHWM (its highest value) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def memory_growth(make: Maker, job: Job) -> int:
    """Bytes that making a row and running it once need at most, over what was in use before."""
    job.network.zero_grad(set_to_none=True)
    gc.collect()
    if job.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        make(job)()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # free pages would be used again without showing
    Path("/proc/self/clear_refs").write_text("5")  # Linux: start VmHWM anew
    before = resident("VmRSS")
    make(job)()
    return resident("VmHWM") - before


def measure(make: Maker, work: Work, settings: argparse.Namespace, send: Connection) -> None:
    """Measure a row in this process, sending each figure as soon as it is known."""
    torch.set_num_threads(settings.threads)
    os.chdir(settings.folder)  # peers write into it, and print
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    tempfile.tempdir = settings.folder
    try:
        job = work.job(settings.device)
        reference = plain(job)
        seconds(reference, settings.device, 2)
        send.send(("plain", seconds(reference, settings.device, work.passes)))
        run = make(job)
        send.send(("made", 0.0))
        first = seconds(run, settings.device, 1)
        send.send(("first", first))
        passes = work.passes if first < 0.1 else 1
        start = time.perf_counter()
        for done in range(settings.repeats):
            pair = (seconds(run, settings.device, passes), seconds(reference, settings.device, work.passes))
            send.send(("pair", pair))
            if done >= 1 and time.perf_counter() - start > settings.limit / 4:
                break
        del run
        send.send(("memory", (memory_growth(make, job), memory_growth(plain, job))))
    except Exception as error:  # whatever a peer raises belongs into its cell
        send.send(("error", f"{type(error).__name__}: {error}"))


def row_of(make: Maker, work: Work, settings: argparse.Namespace) -> dict[str, Any]:
    """Run :func:`measure` in a process of its own, for as long as it may take."""
    processes = get_context("fork")  # rows are functions made here, which do not pickle; this process computes nothing
    receive, send = processes.Pipe(duplex=False)
    process = processes.Process(target=measure, args=(make, work, settings, send))
    process.start()
    send.close()
    row: dict[str, Any] = {}
    pairs: list[tuple[float, float]] = []
    last = time.monotonic()
    deadline = last + SETUP_LIMIT
    while True:
        try:
            if not receive.poll(max(0.0, deadline - time.monotonic())):
                row["bound"] = time.monotonic() - last
                break
            what, value = receive.recv()
        except EOFError:  # it has finished, or died
            break
        last = time.monotonic()
        if what == "made":
            deadline = last + settings.limit
        if what == "pair":
            pairs.append(value)
        else:
            row[what] = value
    process.kill()
    process.join()
    if pairs:
        row["figure"] = statistics.median(time for time, _ in pairs)
        row["reference"] = statistics.median(time for _, time in pairs)
        row["ratio"] = statistics.median(time / plain for time, plain in pairs)
        row["repeats"] = len(pairs)
    elif "error" not in row and "bound" in row and "made" in row:
        row["ratio_above"] = row["bound"] / row["plain"]
    elif "error" not in row:
        row["error"] = f"set-up took over {SETUP_LIMIT} s" if "bound" in row else f"died with code {process.exitcode}"
    if "memory" in row:
        row["memory_growth"], row["memory_reference"] = row.pop("memory")
        row["memory_ratio"] = row["memory_growth"] / row["memory_reference"]
    return row


def cells(row: dict[str, Any]) -> str:
    """The row's figures as printed."""
    if row.get("error"):
        return f"  fails: {row['error'].split(':')[0]}"
    if "ratio" not in row:
        return f"{'':11}{'> ' + format(row['ratio_above'], '.0f'):>9}"
    text = f"{row['samples_per_second']:11,.0f}{row['ratio']:9.2f}"
    return text + (f"{row['memory_growth'] / 2**20:9.1f}{row['memory_ratio']:9.2f}" if "memory_ratio" in row else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS), help="which networks")
    parser.add_argument("--only", help="only rows whose name contains this")
    parser.add_argument("--no-peers", action="store_true", help="only our rows and vmap(grad)")
    parser.add_argument("--quick", action="store_true", help="no peers, 3 repeats")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=60, help="seconds that a row may take once it is made")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    settings = parser.parse_args()
    if settings.quick:
        settings.no_peers, settings.repeats = True, 3
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # dattri compiles; no pool of processes for that

    print(f"{settings.device}, {settings.threads} thread(s), torch {torch.__version__}, {settings.repeats} repeats")
    print(f"{'':52}{'samples/s':>11}{'/ plain':>9}{'MiB':>9}{'/ plain':>9}")
    rows: list[dict[str, Any]] = []
    for key in settings.work:
        work = WORKS[key]
        print(f"{work.title}, batch {work.batch_size}", flush=True)
        for name, make in {"plain forward and backward": plain, **rows_of(key, not settings.no_peers)}.items():
            if settings.only and settings.only not in name:
                continue
            with tempfile.TemporaryDirectory() as settings.folder:
                row = row_of(make, work, settings)
            if "figure" in row:
                row["samples_per_second"] = work.batch_size / row["figure"]
            print(f"  {name:50.50}{cells(row)}", flush=True)
            rows.append({"what": f"{work.title}: {name}", "work": key, "threads": settings.threads, **row})
    if settings.json:
        settings.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
