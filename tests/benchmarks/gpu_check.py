"""What a machine with one accelerator is asked in ten minutes: is it right, does the host wait, what does it cost.

    make gpu-check                                   # on CUDA
    make gpu-check ARGS="--device sim --small"       # a dry run on the simulated device of the tests

Each section runs in a process of its own, with a time limit: one that dies takes no other along. A table is printed,
and all figures are written to build/gpu_check.json. Without an accelerator it says so, and ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from device_cases import METHODS, MODELS, copied, fitted, scored
from torch import Tensor

from cases import QUIET, loader_of
from lightning_attr.attribution.scoring import score
from lightning_attr.callbacks import AttributionCallback, featurizing
from lightning_attr.methods import TRAK, SnapshotFeatures
from lightning_attr.projectors import FactGraSSProjector, FactoredSJLTProjector, KroneckerProjector, RademacherProjector

Found = dict[str, Any]


def trainer_on(device: str, precision: str | None = None, **settings: Any) -> L.Trainer:
    """A quiet Trainer on the CPU, on CUDA or on the simulated device."""
    quiet = {name: value for name, value in QUIET.items() if name not in {"accelerator", "devices"}}
    if device == "sim":
        from sim.trainer import on_sim

        return L.Trainer(**{**quiet, **on_sim(precision), **settings})
    chosen = {"accelerator": "gpu" if device == "cuda" else device, "devices": 1}
    return L.Trainer(**{**quiet, **chosen, **({"precision": precision} if precision else {}), **settings})


def seconds(run: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """The median time of a few calls, the first of them not counted."""
    run()
    times = []
    for _ in range(repeats):
        torch.get_device_module(device).synchronize()
        begin = time.perf_counter()
        run()
        torch.get_device_module(device).synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def facts(device: str, small: bool) -> Found:
    """Versions, and what plain products take."""
    n = 512 if small else 8192
    found: Found = {"torch": torch.__version__, "lightning": L.__version__, "device": device}
    if device == "cuda":
        found["name"] = torch.cuda.get_device_name()
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(n, n, device=device, dtype=dtype)
        found[f"{dtype} Tflop/s"] = 2 * n**3 / seconds(lambda x=x: x @ x, device) / 1e12
    return {**found, "passes": True}


def correctness(device: str, small: bool) -> Found:
    """Every method, on the device and on the CPU."""
    errors: dict[str, float] = {}
    refused: list[str] = []
    for model in list(MODELS)[: 1 if small else None]:
        with tempfile.TemporaryDirectory() as folder:
            module = fitted(model, Path(folder) / "store", featurize=False)
            for name in list(METHODS)[:: 6 if small else 1 if model == "mlp" else 4]:
                values: list[Tensor] = []
                for place in ("cpu", device):
                    own = copied(Path(folder) / "store", Path(folder) / "own")
                    try:
                        result = scored(model, module, METHODS[name].make(), trainer_on(place), store=own)
                        values.append(result.scores.values)
                    except Exception as error:  # to be the same on both
                        refused.append(f"{model}, {name}, {place}: {type(error).__name__}")
                if len(values) == 2:
                    errors[f"{model}, {name}"] = float((values[0] - values[1]).abs().max() / values[0].abs().max())
    worst = sorted(errors.items(), key=lambda item: -item[1])[:5]
    passes = all(error < 1e-3 for error in errors.values()) and len(refused) % 2 == 0
    return {"cases": len(errors), "worst": worst, "refused": refused, "passes": passes}


def untouched(device: str, small: bool) -> Found:
    """Weights with the callback, where two runs without it are the same."""
    found: Found = {}
    for precision in (None, "bf16-mixed", "16-mixed"):
        weights = []
        for callbacks in (False, False, True):
            with tempfile.TemporaryDirectory() as folder:
                own = [AttributionCallback(folder, method=TRAK(proj_dim=64))] if callbacks else []
                torch.manual_seed(0)
                module, trainer = MODELS["cnn"].make(), trainer_on(device, precision, max_epochs=2, callbacks=own)
                trainer.fit(module, loader_of(MODELS["cnn"].data(24, 0), shuffle=True))
                weights.append(torch.cat([p.detach().cpu().flatten() for p in module.parameters()]))
        repeats, same = torch.equal(weights[0], weights[1]), torch.equal(weights[0], weights[2])
        found[precision or "32-true"] = "equal" if same else "differs" if repeats else "differs without the callback"
    return {**found, "passes": "differs" not in found.values()}


def waits(device: str, small: bool) -> Found:
    """How often the host waits for the device in a batch."""
    found: Found = {}
    for model in ("mlp", "mlp, loss", "cnn", "transformer"):
        counts = []
        for n in (32, 96):
            with tempfile.TemporaryDirectory() as folder:
                settings = {"method": TRAK(projector=KroneckerProjector(64)), "snapshots": [0], "batch_size": 8}
                callback = AttributionCallback(folder, featurize=True, **settings)
                trainer = trainer_on(device, max_epochs=1, callbacks=[callback])
                counting = _counting(featurizing.featurize, device, counts)
                with mock.patch("lightning_attr.callbacks.snapshot_recorder.featurize", counting):
                    trainer.fit(MODELS[model].make(), loader_of(MODELS[model].data(n, 0)))
        found[model] = (counts[1] - counts[0]) / 8
    return {**found, "passes": all(number <= 1 for number in found.values())}


def _counting(run: Callable[..., Any], device: str, counts: list[int]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> None:
        if device == "sim":
            import sim

            with sim.counted() as (_, found):
                run(*arguments)
            counts.append(sum(found.values()))
            return
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            run(*arguments)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in seen))

    return counted


def cost(device: str, small: bool) -> Found:
    """Featurizing, as multiples of plain forward and backward passes, in three precisions."""
    from featurize import ours, plain
    from networks import WORKS

    projectors = [KroneckerProjector, FactGraSSProjector, FactoredSJLTProjector, RademacherProjector]
    found: Found = {}
    for key in ["mlp"] if small else ["resnet9", "transformer", "bert", "gpt2"]:
        job = WORKS[key].job(device)
        for precision, low in {"highest": False, "high": False, "bf16": True}.items():
            torch.set_float32_matmul_precision("high" if precision == "high" else "highest")
            chosen = projectors[: 1 if small or precision != "highest" else None]
            # Made outside of autocast, as in training.
            runs = {projector.__name__: ours(projector(256 if small else 2048))(job) for projector in chosen}
            with torch.autocast(device, torch.bfloat16, enabled=low):
                base = seconds(plain(job), device)
                for name, own in runs.items():
                    found[f"{key}, {name}, {precision}"] = round(seconds(own, device) / base, 2)
    return {**found, "passes": True}


def scoring(device: str, small: bool) -> Found:
    """TRAK of stored features, on the device and on the CPU."""
    from score import make_store, synthetic_columns

    n, m, k = (2_000, 100, 64) if small else (50_000, 10_000, 2048)
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder:
        store, values = make_store(Path(folder), n, k), {}
        for topk in (None, 10):
            for place in (device, "cpu") if topk is None else (device,):
                targets = {name: column.to(place) for name, column in synthetic_columns(range(m), k).items()}
                begin = time.perf_counter()
                method, snapshot = TRAK(proj_dim=k), SnapshotFeatures(lambda: store.blocks("final"), targets)
                scores, _ = score(method, [snapshot], n, topk, lambda: Path(folder))
                found[f"{place}, topk={topk}, seconds"] = round(time.perf_counter() - begin, 2)
                values[place, topk] = scores
        apart = values[device, None].values[:1000] - values["cpu", None].values[:1000]
        found["error"] = float(apart.abs().max() / values["cpu", None].values[:1000].abs().max())
    return {**found, "passes": found["error"] < 1e-3}


def linear_algebra(device: str, small: bool) -> Found:
    """Factorizations in float64 against the CPU."""
    n = 200 if small else 3072
    x = torch.randn(n, n, dtype=torch.float64)
    matrix = (x @ x.T / n + torch.eye(n, dtype=torch.float64)).to(device)
    values, vectors = torch.linalg.eigh(matrix)
    factor, pivots, _ = torch.linalg.ldl_factor_ex(matrix)
    right = x.to(device)[:, :8]
    errors = {
        "eigh": (vectors * values @ vectors.T - matrix).abs().max().item(),
        "cholesky": (torch.linalg.cholesky(matrix) @ torch.linalg.cholesky(matrix).T - matrix).abs().max().item(),
        "ldl": (matrix @ torch.linalg.ldl_solve(factor, pivots, right) - right).abs().max().item(),
    }
    return {**errors, "passes": all(error < 1e-8 for error in errors.values())}


SECTIONS: dict[str, tuple[int, Callable[[str, bool], Found]]] = {
    "facts": (40, facts),
    "correctness": (150, correctness),
    "training untouched": (60, untouched),
    "waits": (40, waits),
    "cost": (150, cost),
    "scoring": (100, scoring),
    "linear algebra": (40, linear_algebra),
}


def run(name: str, settings: argparse.Namespace) -> Found:
    """Run a section in a process of its own."""
    limit = SECTIONS[name][0] * settings.patience
    command = [sys.executable, __file__, "--device", settings.device, "--section", name]
    command += ["--small"] if settings.small else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"passes": False, "error": f"over {limit} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"passes": False, "error": "\n".join(done.stderr.strip().splitlines()[-3:])}
    found: Found = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "sim"])
    parser.add_argument("--small", action="store_true", help="sizes for a dry run")
    parser.add_argument("--patience", type=int, default=1, help="times the limits of the sections")
    parser.add_argument("--section", choices=SECTIONS, help="only this one, in this process")
    parser.add_argument("--json", type=Path, default=Path("build/gpu_check.json"))
    settings = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if settings.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device here. A dry run on the simulated one: --device sim --small")
        return
    if settings.device == "sim":
        import sim
        from sim.emulation import like_cuda

        sim.set_device_count(1)
        like_cuda().__enter__()
    if settings.section:
        print(json.dumps(SECTIONS[settings.section][1](settings.device, settings.small)))
        return
    results: dict[str, Found] = {}
    for name in SECTIONS:
        begin = time.perf_counter()
        results[name] = {**run(name, settings), "seconds": round(time.perf_counter() - begin, 1)}
        shown = {key: value for key, value in results[name].items() if key != "passes"}
        print(f"{name:20}{'passes' if results[name]['passes'] else 'FAILS':8}{shown}", flush=True)
    settings.json.parent.mkdir(parents=True, exist_ok=True)
    settings.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
