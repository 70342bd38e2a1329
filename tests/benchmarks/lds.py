"""Linear datamodeling score: how well each method's scores predict models retrained on half subsets.

    python tests/benchmarks/lds.py [--setting mlp ...] [--data FOLDER] [--rows TEXT ...] [--cache DIR] [--json FILE]

Settings are in `lds_settings.py`: scikit-learn's digits, a character language model, and real data in a folder. With
`--truth` only the retrained models are made. Seconds are of this process on one thread, training included.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lds_peers
import lightning as L
import torch
from lds_settings import SETTINGS, LdsSetting
from torch import Tensor

from digits import CACHE, SUBSET_SEEDS
from lightning_attr import AttributionTrainer, FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import SOURCE, TRAK, AttributionMethod, GradDot, Influence, ProjectedSOURCE, TracIn
from lightning_attr.metrics import linear_datamodeling_score
from lightning_attr.pilots import Pilots
from lightning_attr.projectors import EigenProjector, KroneckerProjector, RademacherProjector


def one_run(
    setting: LdsSetting, method: AttributionMethod | None = None, seed: int = 0, pilots: int = 0, **options: Any
) -> Tensor:
    """This package: the callback in one training run, and pilots after it; `options` are the callback's."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = fit(setting, AttributionCallback(folder, method=method, **options), seed)
        short = Pilots(pilots, setting.module) if pilots else None
        return trainer.attribute(setting.datamodule(), pilots=short).scores.values


def merged_runs(setting: LdsSetting, n_runs: int, method: AttributionMethod) -> Tensor:
    """The callback in several runs from different seeds, their stores merged."""
    with tempfile.TemporaryDirectory() as folder:
        stores = [Path(folder) / str(seed) for seed in range(n_runs)]
        for seed, store in enumerate(stores):
            trainer = fit(setting, AttributionCallback(store, method=method), seed)
        FeatureStore.merge(stores, Path(folder) / "merged")
        return trainer.attribute(setting.datamodule(), store=Path(folder) / "merged", method=method).scores.values


def fit(setting: LdsSetting, callback: AttributionCallback, seed: int) -> AttributionTrainer:
    """One training run with the callback."""
    L.seed_everything(seed, verbose=False)
    trainer = AttributionTrainer(
        max_epochs=setting.epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(setting.module(), datamodule=setting.datamodule())
    return trainer


Row = Callable[[LdsSetting], Tensor]
FROM_START = "start+geometric"
FORMER = TRAK(projector=KroneckerProjector(), kernel="margin")

# Each row trains its models and returns their scores (n_train, n_target); its seconds count both.
ROWS: dict[str, Row] = {
    "TRAK(), one run": one_run,
    "TRAK(), one run, another seed": partial(one_run, seed=1),
    "TRAK(), one run from the start": partial(one_run, snapshots=FROM_START),
    **{f"TRAK(), {n} pilot(s)": partial(one_run, pilots=n) for n in (1, 2, 4)},
    "TRAK(exact=True), 2 pilots": partial(one_run, method=TRAK(exact=True), pilots=2),
    "former default: Kronecker, margin kernel": partial(one_run, method=FORMER),
    "TRAK(balanced=False), one run": partial(one_run, method=TRAK(balanced=False)),
    "TRAK(), three runs merged": partial(merged_runs, n_runs=3, method=TRAK()),
    "TRAK(exact=True), one run": partial(one_run, method=TRAK(exact=True)),
    "TRAK(exact=True), one run from the start": partial(one_run, method=TRAK(exact=True), snapshots=FROM_START),
    "TRAK(exact=True), three runs merged": partial(merged_runs, n_runs=3, method=TRAK(exact=True)),
    "TRAK(newton_weights=False), one run": partial(one_run, method=TRAK(newton_weights=False)),
    **{f"TRAK, Kronecker {k}": partial(one_run, method=TRAK(projector=KroneckerProjector(k))) for k in (512, 2048)},
    "TRAK, dense 2048": partial(one_run, method=TRAK(projector=RademacherProjector(2048))),
    **{
        f"TRAK, eigenbasis {k}": partial(one_run, method=TRAK(projector=EigenProjector(k)))
        for k in (256, 512, 1024, 2048, 4096)
    },
    **{f"TRAK, margin kernel, eigenbasis {k}": partial(one_run, method=TRAK(k, kernel="margin")) for k in (512, 2048)},
    "TRAK, margin kernel, exact": partial(one_run, method=TRAK(exact=True, kernel="margin")),
    "TRAK, margin kernel, last snapshot": partial(one_run, method=TRAK(kernel="margin"), snapshots=[]),
    "TRAK, four directions, exact": partial(one_run, method=TRAK(exact=True, directions=4)),
    "TRAK(damping=0.3), one run": partial(one_run, method=TRAK(damping=0.3)),
    "TRAK(), last snapshot of the run": partial(one_run, snapshots=[]),
    "GradDot(), last snapshot of the run": partial(one_run, method=GradDot()),
    "TracIn(exact=True), one run": partial(one_run, method=TracIn(exact=True)),
    **{f"SOURCE({n}), one run": partial(one_run, method=SOURCE(n)) for n in (1, 3)},
    "ProjectedSOURCE(), one run": partial(one_run, method=ProjectedSOURCE()),
    "Astra, last snapshot of the run": partial(one_run, method=Influence(solver="astra", self_influence="ekfac")),
    "EK-FAC, last snapshot of the run": partial(one_run, method=Influence("empirical_fisher", damping=0.01)),
}
PEERS: dict[str, Row] = {
    "traker, 1 model": partial(lds_peers.traker, n_models=1),
    "traker, 10 models": partial(lds_peers.traker, n_models=10),
    "dattri TRAK, snapshots of our run": lds_peers.dattri_trak,
    "kronfluence EK-FAC, 1 model": lds_peers.kronfluence,
}
REFERENCE = "traker, 10 models"


def measure(setting: LdsSetting, masks: Tensor, outputs: Tensor, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """The score of every row with its 95 % interval and its ratio to the reference, and the noise ceiling."""
    rows: list[dict[str, Any]] = []
    known = {**ROWS, **(PEERS if setting.classifies else {})}
    for name in [name for name in known if any(text in name for text in wanted)]:
        start = time.process_time()
        try:
            scores = known[name](setting)
        except ModuleNotFoundError as error:
            print(f"{name:42}  is left out: {error}", flush=True)
            continue
        seconds = time.process_time() - start
        lds = linear_datamodeling_score(scores, masks, outputs)
        mean, low, high, ceiling = (value.item() for value in lds[:4])
        row = {"setting": setting.name, "what": name, "figure": mean, "low": low, "high": high, "seconds": seconds}
        rows.append(row)
        print(f"{name:42}{mean:6.3f}  {low:.3f} to {high:.3f} {seconds:9.1f}", flush=True)
    if rows:
        rows.append({"setting": setting.name, "what": "noise ceiling of the retrained models", "figure": ceiling})
        print(f"{rows[-1]['what']:42}{ceiling:6.3f}")
    reference = next((row["figure"] for row in rows if row["what"] == REFERENCE), rows[0]["figure"] if rows else 1.0)
    return [row | {"reference": reference, "ratio": row["figure"] / reference} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=["mlp"])
    parser.add_argument("--data", type=Path, help="folder of the real data")
    parser.add_argument("--rows", nargs="+", default=[""], help="only those with one of these texts in their names")
    parser.add_argument("--subsets", choices=SUBSET_SEEDS, default="report", help="choose defaults on `tune` only")
    parser.add_argument("--truth", action="store_true", help="make the retrained models, and score nothing")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="directory of the ground truth (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning_attr"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    rows = []
    for name in arguments.setting:
        setting = SETTINGS[name](arguments.data)
        masks, outputs = setting.truth(setting, arguments.subsets, arguments.cache)
        size = sum(parameter.numel() for parameter in setting.module().parameters())
        print(f"{setting.title}: {size:,} parameters, {len(setting.train):,} samples, {len(setting.targets)} targets, "
              f"{outputs.shape[0]} x {len(masks)} models, subsets `{arguments.subsets}`")  # fmt: skip
        if not arguments.truth:
            print(f"{'':42}{'LDS':>6}  {'95 % interval':14}{'seconds':>10}")
            rows += measure(setting, masks, outputs, arguments.rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
