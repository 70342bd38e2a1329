"""Linear datamodeling score on scikit-learn's digits: how well each method's scores predict 300 retrained models.

Run `python tests/benchmarks/lds.py [--setting mlp|cnn] [--cache DIR] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from trak import TRAKer  # type: ignore[import-untyped]  # ships no types
from trak.projectors import BasicProjector, ProjectionType  # type: ignore[import-untyped]  # ships no types

from digits import (
    CACHE,
    SETTINGS,
    SUBSET_SEEDS,
    DigitsClassifier,
    DigitsData,
    Setting,
    ground_truth,
    load,
    trained,
)
from lightning_attr import AttributionTrainer, FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK, AttributionMethod, GradDot
from lightning_attr.metrics import linear_datamodeling_score
from lightning_attr.projectors import RademacherProjector


def traker(setting: Setting, n_models: int, proj_dim: int = 512) -> Tensor:
    """TRAK as released (traker 0.3.2, no ridge), over models trained on all samples from different seeds."""
    x_train, x_test, y_train, y_test = load(setting)
    models = [trained(setting, x_train, y_train, seed) for seed in range(n_models)]
    # Its half precision, the default, takes 25 times as long on a CPU and scores no better: 0.191 for one MLP.
    projector = BasicProjector(
        grad_dim=sum(parameter.numel() for parameter in models[0].parameters()),
        proj_dim=proj_dim,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as save_dir:
        trak = TRAKer(
            model=setting.network(),
            task="image_classification",
            train_set_size=len(x_train),
            save_dir=save_dir,
            device="cpu",
            projector=projector,
            use_half_precision=False,
            logging_level=logging.ERROR,
        )
        # One batch: its projector draws the whole matrix again for every batch.
        for model_id, model in enumerate(models):
            trak.load_checkpoint(model.state_dict(), model_id)
            trak.featurize((x_train, y_train), num_samples=len(x_train))
        trak.finalize_features()
        for model_id, model in enumerate(models):
            trak.start_scoring_checkpoint("digits", model.state_dict(), model_id, num_targets=len(x_test))
            trak.score((x_test, y_test), num_samples=len(x_test))
        return torch.tensor(trak.finalize_scores("digits"))


def one_run(
    setting: Setting, method: AttributionMethod, snapshots: str | list[int] = "geometric", seed: int = 0
) -> Tensor:
    """This package: the callback in one training run, and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = fit(setting, AttributionCallback(folder, method=method, snapshots=snapshots), seed)
        return trainer.attribute().scores.values


def merged_runs(setting: Setting, n_runs: int, method: AttributionMethod) -> Tensor:
    """The callback in several runs from different seeds, their stores merged."""
    with tempfile.TemporaryDirectory() as folder:
        stores = [Path(folder) / str(seed) for seed in range(n_runs)]
        for seed, store in enumerate(stores):
            trainer = fit(setting, AttributionCallback(store, method=method), seed)
        FeatureStore.merge(stores, Path(folder) / "merged")
        return trainer.attribute(store=Path(folder) / "merged", method=method).scores.values


def fit(setting: Setting, callback: AttributionCallback, seed: int) -> AttributionTrainer:
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
    trainer.fit(DigitsClassifier(setting), datamodule=DigitsData(setting))
    return trainer


# Each row trains its models and returns their scores (n_train, n_target); its seconds count both.
ROWS: dict[str, Callable[[Setting], Tensor]] = {
    "TRAK(), one run": partial(one_run, method=TRAK()),
    "TRAK(), one run, another seed": partial(one_run, method=TRAK(), seed=1),
    "TRAK(), one run from the start": partial(one_run, method=TRAK(), snapshots="start+geometric"),
    "TRAK(balanced=False), one run": partial(one_run, method=TRAK(balanced=False)),
    "TRAK(), three runs merged": partial(merged_runs, n_runs=3, method=TRAK()),
    "TRAK(exact=True), one run": partial(one_run, method=TRAK(exact=True)),
    "TRAK(exact=True), one run from the start": partial(one_run, method=TRAK(exact=True), snapshots="start+geometric"),
    "TRAK(exact=True), three runs merged": partial(merged_runs, n_runs=3, method=TRAK(exact=True)),
    "TRAK(newton_weights=False), one run": partial(one_run, method=TRAK(newton_weights=False)),
    "TRAK(), one run, dense projection": partial(one_run, method=TRAK(projector=RademacherProjector(2048))),
    "TRAK(damping=0.3), one run": partial(one_run, method=TRAK(damping=0.3)),
    "TRAK(), last snapshot of the run": partial(one_run, method=TRAK(), snapshots=[]),
    "GradDot(), last snapshot of the run": partial(one_run, method=GradDot()),
    "traker, 1 model": partial(traker, n_models=1),
    "traker, 10 models": partial(traker, n_models=10),
}
REFERENCE = "traker, 10 models"


def measure(setting: Setting, masks: Tensor, outputs: Tensor, wanted: str) -> list[dict[str, Any]]:
    """The score of every row with its 95 % interval and its ratio to the reference, and the noise ceiling."""
    rows: list[dict[str, Any]] = []
    for name, attribute in ROWS.items():
        if wanted not in name:
            continue
        start = time.perf_counter()
        scores = attribute(setting)
        seconds = time.perf_counter() - start
        lds = linear_datamodeling_score(scores, masks, outputs)
        mean, low, high, ceiling = (value.item() for value in lds[:4])
        rows.append({
            "setting": setting.name,
            "what": name,
            "figure": mean,
            "low": low,
            "high": high,
            "seconds": seconds,
        })
    rows.append({"setting": setting.name, "what": "noise ceiling of the retrained models", "figure": ceiling})
    reference = next((row["figure"] for row in rows if row["what"] == REFERENCE), rows[0]["figure"])
    return [row | {"reference": reference, "ratio": row["figure"] / reference} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="mlp")
    parser.add_argument("--rows", default="", help="only those with this text in their names")
    parser.add_argument("--subsets", choices=SUBSET_SEEDS, default="report", help="choose defaults on `tune` only")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="directory of the ground truth (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    setting = SETTINGS[arguments.setting]
    rows = measure(setting, *ground_truth(setting, arguments.subsets, arguments.cache), arguments.rows)
    print(f"digits, {arguments.setting}, subsets `{arguments.subsets}`; seconds on one CPU thread, training included")
    print(f"{'':40}{'LDS':>6}  {'95 % interval':15}{'ratio':>6}{'seconds':>9}")
    for row in rows:
        interval = f"{row['low']:.3f} to {row['high']:.3f}" if "low" in row else ""
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
        print(f"{row['what']:40}{row['figure']:6.3f}  {interval:15}{row['ratio']:6.2f}{seconds:>9}")
    known = {row["what"] for row in rows}
    print(f"ratio: to `{REFERENCE if REFERENCE in known else rows[0]['what']}`")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
