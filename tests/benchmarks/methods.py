"""Every method of the field on scikit-learn's digits, beside the same methods of other libraries, as one table.

    python tests/benchmarks/methods.py [--setting lr mlp cnn] [--only REGEX] [--json FILE] [--cache DIR] [--tune]

LDS: over 100 half subsets, with its 95 % interval; the last rows have the ceiling that the noise of retraining leaves.
LOO: of logistic regression, over 100 left-out samples, Pearson and Spearman. AUROC: of self-influence, against 10 % of
labels flipped, in a run of its own. Best out: points of test accuracy lost by retraining without the 20 % of samples of
highest mean score, less what random ones lose, over 3 seeds. Trainings: processor seconds of one thread for all scores,
as multiples of one training without Lightning: the least of three calls; above a second of two calls of a peer, which
may compile, and one of ours; of one above 15 s, and where a method solves for each target (fewer of them: "targets").
Methods on retrained models read the `tune` subsets; what these cost to train is in their price.

"One run" are the snapshots after epochs 0, 1, 2, 4, 8, ..., "from the start" has the initial weights too. LESS has no
row: it needs the moments of Adam, and these networks train with SGD, or L-BFGS.

Settings are in `methods_tuned.py`, most of them chosen by `--tune` on the `tune` subsets; all else is measured on the
`report` subsets. The first time takes longer, for models retrained without some samples; they are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
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
from methods_runs import (
    NETWORKS,
    Data,
    Run,
    clean,
    leave_one_out_truth,
    noisy,
    recorded,
    retrained,
    subset_truth,
    thinned,
)
from methods_tuned import TUNED
from methods_verdicts import verdicts
from safetensors.torch import load_file, save_file
from torch import Tensor

from digits import CACHE, Setting
from lightning_attr.metrics import leave_one_out_correlation, linear_datamodeling_score, noisy_label_auroc

SEEDS = 3
BEST_OUT = 0.2
TUNE_EVERY = 6  # targets, so that tuning takes a fraction of the time
SHORT, LONG = 1.0, 15.0  # seconds: what is shorter is timed three times, what is longer once
IMPORTED = ("dattri.algorithm.influence_function", "kronfluence.analyzer", "captum.influence", "trak")
EXACT = ("IF explicit (Hessian), ours", "IF CG (Hessian), ours")


def timed(call: Callable[[], Tensor], repeats: int = 1) -> tuple[Tensor, float]:
    """What it returns, and the least of its processor seconds: other programs only ever add to them."""
    seconds: list[float] = []
    while not seconds or len(seconds) < (1 if seconds[0] > LONG else repeats if seconds[0] > SHORT else 3):
        start = time.process_time()
        found = call()
        seconds.append(time.process_time() - start)
    return found, min(seconds)


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
    same = setting.name == "lr"  # whose retraining has no seed
    found = [accuracy_without(setting, data, order(seed)[:count], 0 if same else seed, cache) for seed in range(SEEDS)]
    return statistics.mean(found)


def loss_without(setting: Setting, data: Data, first: Tensor, share: float, cache: Path) -> float:
    """Points of accuracy that removing the first samples costs more than removing random ones."""
    random = mean_accuracy(setting, data, random_order(len(data.x)), share, cache)
    return random - mean_accuracy(setting, data, lambda _: first, share, cache)


def random_order(n: int) -> Callable[[int], Tensor]:
    """Of n samples, another for each seed."""
    return lambda seed: torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def scores_of(row: Row, key: str, run: Run, own: bool, settings: Mapping[str, Any] | None = None) -> Tensor:
    """Scores (n_train, n_target), or self-influence (n_train,), with the tuned settings."""
    return row.scores(run, own, **(TUNED.get(row.name, {}).get(key, {}) if settings is None else settings))


def measure(row: Row, key: str, runs: tuple[Run, Run], mask: Tensor, cache: Path) -> tuple[dict[str, Any], Tensor]:
    """All figures of a row but the ratios, and its scores."""
    run, noisy_run = (thinned(run, row.every) for run in runs)
    setting = run.setting
    repeats = 1 if row.by == "ours" or row.every > 1 else 2
    scores, seconds = timed(lambda: scores_of(row, key, run, own=False), repeats)
    masks, outputs = subset_truth(setting, "report", cache)
    lds = linear_datamodeling_score(scores, masks, outputs[..., :: row.every])
    figures = {"lds": float(lds.mean), "low": float(lds.low), "high": float(lds.high), "seconds": seconds}
    figures["targets"] = scores.shape[1]
    best = scores.mean(1).argsort(descending=True)
    figures["best_out"] = loss_without(setting, run.data, best, BEST_OUT, cache)
    if row.own:
        figures["auroc"] = float(noisy_label_auroc(scores_of(row, key, noisy_run, own=True), mask))
    if key == "lr":
        rows, differences = leave_one_out_truth(cache)
        loo = leave_one_out_correlation(scores[rows], differences[:, :: row.every], bootstrap=0)
        figures |= {"pearson": float(loo.pearson.mean), "spearman": float(loo.spearman.mean)}
    return figures, scores


def difference(exact: Tensor, other: Tensor) -> float:
    """Largest difference of two matrices of scores, as a share of the largest score of its target."""
    exact = exact[:, :: exact.shape[1] // other.shape[1]]
    return float(((exact - other).abs().amax(0) / exact.abs().amax(0)).max())


def measure_network(key: str, wanted: re.Pattern[str], cache: Path, keep: Callable[[list[Any]], None]) -> list[Any]:
    """Every row of a network; `keep` gets those that are there, time and again."""
    setting = NETWORKS[key]
    data = clean(setting)
    flipped, mask = noisy(data)
    masks, outputs = subset_truth(setting, "report", cache)
    training = timed(lambda: retrained(setting, data.x, data.y, 0) and mask, repeats=3)[1]
    rows: list[dict[str, Any]] = []
    found: dict[str, Tensor] = {}
    with recorded(setting, data, cache) as run, recorded(setting, flipped, cache) as noisy_run:
        for row in ROWS:
            if key not in row.networks or not wanted.search(row.name):
                continue
            settings = TUNED.get(row.name, {}).get(key, {})
            shown = {"network": key, "method": row.method, "by": row.by, "settings": settings}
            try:
                figures, scores = measure(row, key, (run, noisy_run), mask, cache)
            except Exception as error:  # a peer that cannot do a network says so in the table
                figures = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            else:
                retrainings = outputs.shape[0] * len(masks) / 2 if row.fitted else 0  # of half the samples
                figures["trainings"] = figures["seconds"] / training + retrainings
                if row.name in EXACT:
                    found[row.name] = scores
            rows.append({**shown, **figures})
            print(line(rows[-1]), flush=True)
            keep(rows)
    ceiling = linear_datamodeling_score(torch.randn(len(data.x), len(data.x_target)), masks, outputs).ceiling
    best = 1.0 if key == "lr" else float(ceiling)  # retraining logistic regression has no noise
    rows.append({"network": key, "method": "noise ceiling", "by": "", "settings": {}, "lds": best})
    rows.append({"network": key, "method": "one training", "by": "", "settings": {}, "seconds": training})
    if len(found) == len(EXACT):
        apart = difference(*(found[name] for name in EXACT))
        rows.append({"network": key, "method": "explicit less CG", "by": "", "settings": {}, "difference": apart})
    for row in rows:
        if not row["by"]:
            print(line(row), flush=True)
    return rows


COLUMNS = {
    "targets": "{}",
    "pearson": "{:.3f}",
    "spearman": "{:.3f}",
    "auroc": "{:.3f}",
    "best_out": "{:+.1f}",
    "trainings": "{:.1f}",
}
HEAD = "| network | method | by | settings | LDS | targets | LOO r | LOO rho | AUROC | best out | trainings |"


def line(row: Mapping[str, Any]) -> str:
    """A row in Markdown."""
    settings = " ".join(f"{name}={value:g}" if value else f"{name}={value}" for name, value in row["settings"].items())
    if "error" in row:
        figures = [f"fails: {row['error'][:60]}", *[""] * len(COLUMNS)]
    else:
        lds = f"{row['lds']:.3f}" if "lds" in row else ""
        lds = lds or (f"{row['difference']:.1e}" if "difference" in row else f"{row['seconds']:.2f} s")
        lds += f" ({row['low']:.3f} to {row['high']:.3f})" if "low" in row else ""
        figures = [lds, *(text.format(row[name]) if name in row else "" for name, text in COLUMNS.items())]
    return f"| {' | '.join([row['network'], row['method'], row['by'], settings, *figures])} |"


def tune(key: str, wanted: re.Pattern[str], cache: Path) -> None:
    """Print the score of every setting on the subsets `tune`, for some targets, best last."""
    setting = NETWORKS[key]
    data = clean(setting)
    data = data._replace(x_target=data.x_target[::TUNE_EVERY], y_target=data.y_target[::TUNE_EVERY])
    masks, outputs = subset_truth(setting, "tune", cache)
    truth = masks, outputs[..., ::TUNE_EVERY]
    with recorded(setting, data, cache) as run:
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
    for module in IMPORTED:
        importlib.import_module(module)  # so that no row pays for it
    print(f"{HEAD}\n|{'---|' * (HEAD.count('|') - 1)}")
    rows: list[dict[str, Any]] = []

    def keep(more: list[dict[str, Any]]) -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(rows + more, indent=1))

    for key in arguments.setting:
        rows += measure_network(key, arguments.only, arguments.cache, keep)
    keep([])
    print(*verdicts(rows), sep="\n")


if __name__ == "__main__":
    main()
