"""The leaderboard: how well each method says what training again without some of the text does to a language model.

    python tests/benchmarks/leaderboard.py [--folder DIR] [--rows TEXT ...] [--bergson PYTHON] [--quick] [--plot FILE]

Model, text and bank are those of `leaderboard_text.py`, the rows those of `leaderboard_rows.py` and,
with `--bergson`, of `leaderboard_peers.py`. One bank judges all:

- LDS: rank correlation of summed scores with the queries' log-likelihoods over 100 removals of 1 %, same weights and
  order; "another seed": over 50 of them from other weights in another order; and over 30 half subsets.
- QLD: rise of a query's loss, in nats per token, when it is trained again without the 1 % of chunks with the highest
  scores for it; mean over the first 16 queries.

Intervals hold 95 %. Dampings are chosen on 25 other queries by LDS, for ours and the peers'. Costs are processor
seconds of a row in a process of its own, beside those of one training, and how much its memory grew.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import leaderboard_peers
import torch
from leaderboard_rows import ROWS, Row, record
from leaderboard_text import FEW, N_REPORT, N_TRAIN, N_TUNE, Bank, random_removals, trained, without
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_attr.metrics import linear_datamodeling_score

FOLDER = Path("build") / "leaderboard"
ASKED = 16
"""Queries of QLD."""
TUNE, REPORT = slice(0, N_TUNE), slice(N_TUNE, N_TUNE + N_REPORT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of what is kept (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", default=[""], help="only those with one of these texts in their names")
    parser.add_argument(
        "--bergson", help="Python of an environment that has bergson 2.5.1; without, its rows are left out"
    )
    parser.add_argument("--quick", action="store_true", help="20 removals, and no QLD")
    parser.add_argument("--plot", type=Path, help="write a picture of LDS against cost")
    parser.add_argument("--score", nargs=2, metavar=("ROW", "DAMPING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.score:
        score(ROWS, arguments.folder, *arguments.score)
        return
    rows = measure(arguments.folder, arguments.rows, arguments.quick, arguments.bergson)
    print(table(rows))
    (arguments.folder / "rows.json").write_text(json.dumps(rows, indent=1))
    if arguments.plot:
        plot(rows, arguments.plot)


# Scores, each row in a process of its own -----------------------------------------------------------------------------


def score(rows: Mapping[str, Row | dict[float, Row]], folder: Path, name: str, damping: str) -> None:
    """Score by one row, and write scores and costs."""
    for logger in ("lightning.pytorch", "lightning_attr"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    found = rows[name]
    row = found[float(damping)] if isinstance(found, dict) else found
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    scores = row(folder / "run")
    seconds = time.process_time() - begin
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    path = path_of(folder, name, damping)
    path.parent.mkdir(exist_ok=True)
    save_file({"scores": scores.float().contiguous(), "costs": torch.tensor([seconds, grown])}, path)


def path_of(folder: Path, name: str, damping: object) -> Path:
    plain = "".join(letter if letter.isalnum() else "-" for letter in f"{name} {damping}")
    return folder / "scores" / f"{plain}.safetensors"


def scored(folder: Path, name: str, damping: object, bergson: str | None) -> tuple[Tensor, float, float] | None:
    """Score by a row of ours or of a peer's; see `scored_by`."""
    path = path_of(folder, name, damping)
    command = [sys.executable, __file__, "--folder", str(folder), "--score", name, str(damping)]
    if name in leaderboard_peers.ROWS:
        path.parent.mkdir(exist_ok=True)
        script = str(Path(leaderboard_peers.__file__))
        command = [str(bergson), script, str(folder), name, str(damping), str(path)]
    return scored_by(command, path, f"{name} (damping {damping})")


def scored_by(command: list[str], path: Path, what: str) -> tuple[Tensor, float, float] | None:
    """Scores (N_TRAIN, N_TUNE + N_REPORT), processor seconds and MiB; None where the row fails, which is told."""
    if not path.exists():
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            print(f"{what} is left out: {done.stderr.strip().splitlines()[-1]}", flush=True)
            return None
    tensors = load_file(path)
    return (tensors["scores"], *tensors["costs"].tolist())


# Judging --------------------------------------------------------------------------------------------------------------


def judge(scores: Tensor, truths: dict[str, tuple[Tensor, Tensor]], queries: slice) -> dict[str, list[float]]:
    """LDS of each family of subsets: its mean and its interval."""
    found = {}
    for name, (kept, outputs) in truths.items():
        lds = linear_datamodeling_score(scores[:, queries], kept, outputs[:, queries])
        found[name] = [float(lds.mean), float(lds.low), float(lds.high)]
    return found


def loss_rises(scores: Tensor, bank: Bank, whole: Tensor) -> Tensor:
    """What training again without the highest scores of a query adds to its loss, (ASKED,)."""
    asked = scores[:, REPORT][:, :ASKED]
    kept = torch.stack([without(asked[:, j].topk(FEW).indices.tolist()) for j in range(ASKED)])
    left = bank.outputs(kept, 0)[:, REPORT][:, :ASKED].diagonal()
    return whole[REPORT][:ASKED] - left


def interval(values: Tensor) -> list[float]:
    """Mean, and 95 % of a bootstrap over the queries."""
    generator = torch.Generator().manual_seed(0)
    drawn = values[torch.randint(len(values), (2000, len(values)), generator=generator)].mean(1)
    return [float(values.mean()), *drawn.quantile(torch.tensor([0.025, 0.975]).to(drawn)).tolist()]


def measure(folder: Path, wanted: list[str], quick: bool, bergson: str | None) -> list[dict[str, Any]]:
    """All figures of all rows."""
    if not (folder / "run").exists():
        record(folder / "run", 0)
    if bergson and not (folder / "peers").exists():
        leaderboard_peers.export(folder / "run", folder / "peers")
    bank, count = Bank(folder), 20 if quick else 100
    few = random_removals(count, FEW, 1)
    truths = {"lds": (few, bank.outputs(few, 0))}
    if not quick:
        half = random_removals(30, N_TRAIN // 2, 2)
        truths |= {"seed": (few[:50], bank.outputs(few[:50], 1)), "half": (half, bank.outputs(half, 0))}
    whole = bank.outputs(without([])[None], 0)[0]
    begin = time.process_time()
    trained(torch.ones(N_TRAIN), 0)
    training = time.process_time() - begin
    rows = []
    dampings = {name: list(row) if isinstance(row, dict) else [None] for name, row in ROWS.items()}
    dampings |= {name: list(row[1]) for name, row in leaderboard_peers.ROWS.items()} if bergson else {}
    for name in [name for name in dampings if any(text in name for text in wanted)]:
        tried = {damping: scored(folder, name, damping, bergson) for damping in dampings[name]}
        rises = None if quick else partial(loss_rises, bank=bank, whole=whole)
        rows += judged(name, tried, truths, training, rises)
    return rows


def judged(
    name: str,
    tried: Mapping[Any, tuple[Tensor, float, float] | None],
    truths: dict[str, tuple[Tensor, Tensor]],
    training: float,
    rises: Callable[[Tensor], Tensor] | None,
) -> list[dict[str, Any]]:
    """The figures of a row, with the damping that the queries to tune on choose; nothing where no scores are there."""
    worked = {damping: found for damping, found in tried.items() if found is not None}
    if not worked:
        return []
    best = max(worked, key=lambda damping: judge(worked[damping][0], {"lds": truths["lds"]}, TUNE)["lds"][0])
    scores, seconds, grown = worked[best]
    row = {"what": name, "damping": best, **judge(scores, truths, REPORT), "cost": seconds / training, "memory": grown}
    row |= {} if rises is None else {"qld": interval(rises(scores))}
    print(json.dumps(row), flush=True)
    return [row]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| | damping | LDS | another seed | half subsets | QLD | trainings | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["lds"][0]):
        known = ("lds", "seed", "half", "qld")
        figures = ["{:.3f} ({:.3f} to {:.3f})".format(*row[key]) if key in row else "" for key in known]
        damping = "" if row["damping"] is None else f"{row['damping']:g}"
        lines.append(f"| {row['what']} | {damping} | {' | '.join(figures)} | {row['cost']:.2f} | {row['memory']:.0f} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """LDS against cost."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for row in rows:
        mean, low, high = row["lds"]
        peer = row["what"].startswith("bergson")
        color = "C1" if peer else "C0"
        cost = max(row["cost"], 0.01)
        axes.errorbar(cost, mean, [[max(mean - low, 0)], [max(high - mean, 0)]], fmt="s" if peer else "o", color=color)
        axes.annotate(row["what"], (cost, mean), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="cost in trainings", ylabel="LDS, removals of 1 %, same seed")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
