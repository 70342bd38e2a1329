"""Every method of the field on scikit-learn's digits, beside the same methods of other libraries, as one table.

    python tests/benchmarks/methods.py [--setting lr mlp cnn] [--only REGEX] [--json FILE] [--cache DIR] [--tune]

LDS: over 100 half subsets, with its 95 % interval; the last row has the ceiling that the noise of retraining leaves.
LOO: of logistic regression, over 100 left-out samples, Pearson and Spearman. AUROC: of self-influence, against 10 % of
labels flipped, in a run of its own. Best out: points of test accuracy lost by retraining without the 20 % of samples of
highest mean score, less what random ones lose. Flipped out: points gained in the run with flipped labels by retraining
without the 10 % of highest self-influence, less what random ones gain; both of 3 seeds. Times: processor seconds of one
thread, as multiples of one training without Lightning, for the scores of 1437 samples x 360 targets.

Damping and its like are in `methods_tuned.py`, chosen by `--tune` on the `tune` subsets; all else is measured on the
`report` subsets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from methods_rows import ROWS, Row
from methods_runs import NETWORKS, Data, Run, clean, leave_one_out_truth, noisy, recorded, retrained, subset_truth
from methods_tuned import TUNED
from safetensors.torch import load_file, save_file
from torch import Tensor

from digits import CACHE, Setting
from lightning_attr.metrics import leave_one_out_correlation, linear_datamodeling_score, noisy_label_auroc

SEEDS = 3
BEST_OUT, FLIPPED_OUT = 0.2, 0.1
TUNE_EVERY = 6  # targets, so that tuning takes a fraction of the time
SHORT = 2.0  # seconds, below which a row is timed three times


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it returns, and the median of its processor seconds."""
    seconds = []
    while not seconds or (len(seconds) < 3 and seconds[0] < SHORT):
        start = time.process_time()
        found = call()
        seconds.append(time.process_time() - start)
    return found, statistics.median(seconds)


def accuracy_without(setting: Setting, data: Data, removed: Tensor, seed: int, cache: Path) -> float:
    """Test accuracy of a model retrained without some samples, in percent; kept on disk."""
    recipe = repr((str(setting), data.y.tolist(), removed.sort().values.tolist(), seed))
    path = cache / "digits-removed" / f"{hashlib.sha256(recipe.encode()).hexdigest()[:20]}.safetensors"
    if not path.exists():
        kept = torch.ones(len(data.x), dtype=torch.bool)
        kept[removed] = False
        right = retrained(setting, data.x[kept], data.y[kept], seed)(data.x_target).argmax(1) == data.y_target
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"accuracy": 100 * right.double().mean()}, path)
    return float(load_file(path)["accuracy"])


def mean_accuracy(setting: Setting, data: Data, order: Callable[[int], Tensor], share: float, cache: Path) -> float:
    """Over seeds, without the first samples of each seed's order."""
    count = round(share * len(data.x))
    found = [accuracy_without(setting, data, order(seed)[:count], seed, cache) for seed in range(SEEDS)]
    return statistics.mean(found)


def gain_without(setting: Setting, data: Data, first: Tensor, share: float, cache: Path) -> float:
    """Points of accuracy by which removing the first samples is better than removing random ones."""
    random = mean_accuracy(setting, data, random_order(len(data.x)), share, cache)
    return mean_accuracy(setting, data, lambda _: first, share, cache) - random


def random_order(n: int) -> Callable[[int], Tensor]:
    """Of n samples, another for each seed."""
    return lambda seed: torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def scores_of(row: Row, key: str, run: Run, own: bool, settings: Mapping[str, Any] | None = None) -> Tensor:
    """Scores (n_train, n_target), or self-influence (n_train,), with the tuned settings."""
    return row.scores(run, own, **(TUNED.get(row.name, {}).get(key, {}) if settings is None else settings))


def measure(row: Row, key: str, runs: tuple[Run, Run], mask: Tensor, cache: Path) -> dict[str, Any]:
    """All figures of a row but the ratios."""
    (run, noisy_run), setting = runs, runs[0].setting
    scores, seconds = timed(lambda: scores_of(row, key, run, own=False))
    lds = linear_datamodeling_score(scores, *subset_truth(setting, "report", cache))
    figures = {"lds": float(lds.mean), "low": float(lds.low), "high": float(lds.high), "seconds": seconds}
    best = scores.mean(1).argsort(descending=True)
    figures["best_out"] = -gain_without(setting, run.data, best, BEST_OUT, cache)
    if row.own:
        own = scores_of(row, key, noisy_run, own=True)
        figures["auroc"] = float(noisy_label_auroc(own, mask))
        doubtful = own.argsort(descending=True)
        figures["flipped_out"] = gain_without(setting, noisy_run.data, doubtful, FLIPPED_OUT, cache)
    if key == "lr":
        rows, differences = leave_one_out_truth(cache)
        loo = leave_one_out_correlation(scores[rows], differences, bootstrap=0)
        figures |= {"pearson": float(loo.pearson.mean), "spearman": float(loo.spearman.mean)}
    return figures


def measure_network(key: str, wanted: re.Pattern[str], cache: Path) -> list[dict[str, Any]]:
    """Every row of a network."""
    setting = NETWORKS[key]
    data = clean(setting)
    flipped, mask = noisy(data)
    masks, outputs = subset_truth(setting, "report", cache)
    training = statistics.median(timed(lambda: retrained(setting, data.x, data.y, 0) and mask)[1] for _ in range(3))
    rows: list[dict[str, Any]] = []
    with recorded(setting, data) as run, recorded(setting, flipped) as noisy_run:
        for row in ROWS:
            if key not in row.networks or not wanted.search(row.name):
                continue
            settings = TUNED.get(row.name, {}).get(key, {})
            shown = {"network": key, "method": row.method, "by": row.by, "settings": settings}
            try:
                figures = measure(row, key, (run, noisy_run), mask, cache)
            except Exception as error:  # a peer that cannot do a network says so in the table
                figures = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            else:
                figures["trainings"] = figures["seconds"] / training
            rows.append({**shown, **figures})
            print(line(rows[-1]), flush=True)
    ceiling = linear_datamodeling_score(torch.randn(len(data.x), len(data.x_target)), masks, outputs).ceiling
    best = 1.0 if key == "lr" else float(ceiling)  # retraining logistic regression has no noise
    rows.append({"network": key, "method": "noise ceiling", "by": "", "settings": {}, "lds": best})
    rows.append({"network": key, "method": "one training", "by": "", "settings": {}, "seconds": training})
    for row in rows[-2:]:
        print(line(row), flush=True)
    return rows


COLUMNS = {
    "pearson": "{:.3f}",
    "spearman": "{:.3f}",
    "auroc": "{:.3f}",
    "best_out": "{:+.1f}",
    "flipped_out": "{:+.1f}",
    "trainings": "{:.1f}",
}
HEAD = "| network | method | by | settings | LDS | LOO r | LOO rho | AUROC | best out | flipped out | trainings |"


def line(row: Mapping[str, Any]) -> str:
    """A row in Markdown."""
    settings = " ".join(f"{name}={value:g}" if value else f"{name}={value}" for name, value in row["settings"].items())
    if "error" in row:
        figures = [f"fails: {row['error'][:60]}", *[""] * len(COLUMNS)]
    else:
        lds = f"{row['lds']:.3f}" if "lds" in row else f"{row['seconds']:.2f} s"
        lds += f" ({row['low']:.3f} to {row['high']:.3f})" if "low" in row else ""
        figures = [lds, *(text.format(row[name]) if name in row else "" for name, text in COLUMNS.items())]
    return f"| {' | '.join([row['network'], row['method'], row['by'], settings, *figures])} |"


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Where a method of ours is slower than its fastest peer, or below its best by more than the interval."""
    found = []
    measured = [row for row in rows if "low" in row]
    for row in measured:
        if row["by"] != "ours":
            continue
        same = [r for r in measured if (r["network"], r["method"]) == (row["network"], row["method"]) and r is not row]
        name = f"{row['network']}: {row['method']}"
        for peer in same:
            if row["seconds"] > peer["seconds"]:
                found.append(f"{name}: {row['seconds'] / peer['seconds']:.2f} times the seconds of {peer['by']}")
            if row["high"] < peer["lds"]:
                found.append(f"{name}: LDS {row['lds']:.3f}, of {peer['by']} {peer['lds']:.3f}")
    return found


def tune(key: str, wanted: re.Pattern[str], cache: Path) -> None:
    """Print the score of every setting on the subsets `tune`, for some targets, best last."""
    setting = NETWORKS[key]
    data = clean(setting)
    data = data._replace(x_target=data.x_target[::TUNE_EVERY], y_target=data.y_target[::TUNE_EVERY])
    masks, outputs = subset_truth(setting, "tune", cache)
    truth = masks, outputs[..., ::TUNE_EVERY]
    with recorded(setting, data) as run:
        for row in ROWS:
            if key not in row.networks or not wanted.search(row.name) or len(row.grid) == 1:
                continue
            found = []
            for settings in row.grid:
                try:
                    scores = scores_of(row, key, run, own=False, settings=settings)
                    lds = float(linear_datamodeling_score(scores, *truth, bootstrap=0).mean)
                except Exception as error:
                    lds = float("-inf")
                    print(f"{key}: {row.name} {settings}: {type(error).__name__}: {error}"[:160], flush=True)
                found.append((lds, str(settings)))
            print(f"{key}: {row.name}:", *(f"{lds:.3f} {settings}" for lds, settings in sorted(found)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX", help="rows, `method, by`")
    parser.add_argument("--cache", type=Path, default=CACHE, help="of what is retrained (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--tune", action="store_true", help="try the settings of each row instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning", "lightning.pytorch", "lightning_attr", "dattri", "kronfluence"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # the peers' and Lightning's own
    if arguments.tune:
        for key in arguments.setting:
            tune(key, arguments.only, arguments.cache)
        return
    print(f"{HEAD}\n|{'---|' * (HEAD.count('|') - 1)}")
    rows = [row for key in arguments.setting for row in measure_network(key, arguments.only, arguments.cache)]
    print(*verdicts(rows), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
