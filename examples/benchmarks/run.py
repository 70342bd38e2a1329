"""A benchmark setting of the field in one command: train, attribute, retrain on half subsets, compare.

Run `python examples/benchmarks/run.py mnist-lr --data DIR`, or with `--stand-in` in place of the data. README.md beside
this file lists the settings, where their data come from, and the published figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from data import BenchmarkData, MissingDataError, Pair, first, flip_labels
from settings import SETTINGS, Recipe, Setting
from torch import Tensor

from lightning_attr import AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.evaluation import GroundTruth, retrain_lds
from lightning_attr.methods import TRAK
from lightning_attr.metrics import linear_datamodeling_score

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def make_data(setting: Setting, recipe: Recipe, pair: Pair, flipped: float) -> tuple[BenchmarkData, Tensor | None]:
    """The data of a run, and which of the training labels are flipped.

    Raises:
        ValueError: if there are no labels to flip.
    """
    train, targets = first(pair[0], recipe.n_train), first(pair[1], recipe.n_targets)
    mask = None
    if flipped:
        if setting.classes is None:
            raise ValueError(f"Expected no flipped labels for {setting.title}, which has no labels.")
        train, mask = flip_labels(train, flipped, setting.classes)
    data = BenchmarkData(setting.augment(setting.prepare(train)), setting.prepare(targets), recipe.batch_size)
    return data, mask


def measure(
    setting: Setting, recipe: Recipe, pair: Pair, flipped: float, folder: Path, accelerator: str = "auto"
) -> dict[str, Any]:
    """Run a setting.

    Returns:
        Figures by name: parameters, samples, seconds of each part, and whatever of ``lds``, ``low``, ``high``,
        ``ceiling``, ``auroc`` and ``loss_auroc`` is defined; ``found`` retrainings were in the folder before.
    """
    data, mask = make_data(setting, recipe, pair, flipped)
    make_trainer = partial(L.Trainer, accelerator=accelerator, devices=1, **QUIET, **recipe.trainer)
    figures: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in recipe.module().parameters()),
        "n_train": len(data.train),
        "n_targets": len(data.targets),
        "subsets": recipe.subsets,
        "seeds": recipe.seeds,
        "seconds": {},
    }
    timed = partial(_timed, figures["seconds"])

    def fit(trainer: L.Trainer) -> L.Trainer:
        L.seed_everything(0, verbose=False)
        trainer.fit(recipe.module(), datamodule=data)
        return trainer

    timed("one training", lambda: fit(make_trainer()))
    with tempfile.TemporaryDirectory() as store:
        callback = AttributionCallback(store, method=TRAK(recipe.proj_dim), noise_mask=mask, log=False)
        trainer = AttributionTrainer(
            accelerator=accelerator, devices=1, callbacks=[callback], **QUIET, **recipe.trainer
        )
        timed("one training with the callback", lambda: fit(trainer))
        result = timed("attribute", lambda: trainer.attribute(data))
        scores = result.scores.values.clone()
    if mask is not None:
        figures["auroc"] = result.metrics["noisy_label_auroc"]
        figures["loss_auroc"] = result.metrics["loss_noisy_label_auroc"]
    if recipe.subsets:
        found = GroundTruth.open(folder).finished.sum().item() if (folder / "manifest.json").exists() else 0
        figures["found"] = int(found)
        truth = timed(
            "ground truth",
            lambda: retrain_lds(
                recipe.module, make_trainer, data, dirpath=folder, num_subsets=recipe.subsets, seeds=recipe.seeds
            ),
        )
        lds = linear_datamodeling_score(scores, truth.masks, truth.outputs)
        figures |= {name: getattr(lds, name).item() for name in ("low", "high", "ceiling")} | {"lds": lds.mean.item()}
    return figures


def _timed(seconds: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    seconds[name] = time.perf_counter() - start
    return result


def report(setting: Setting, recipe: Recipe, figures: dict[str, Any], stand_in: bool) -> None:
    """Print what was measured, beside what is published."""
    print(f"{setting.title}: {figures['parameters']:,} parameters, {figures['n_train']} training samples, "
          f"{figures['n_targets']} targets")  # fmt: skip
    if stand_in:
        print("On a stand-in for the data: its figures say that the command works, and nothing about the setting.")
    if recipe.reduced:
        print(f"Reduced: {recipe.reduced}.")
    one = figures["seconds"]["one training"]
    print(f"{'':32}{'seconds':>9}{'trainings':>11}")
    for name, seconds in figures["seconds"].items():
        times = f", {figures['subsets']} x {figures['seeds']}" if name == "ground truth" else ""
        times += f" ({figures['found']} were there)" if times and figures["found"] else ""
        print(f"{name + times:32}{seconds:9.1f}{seconds / one:11.2f}")
    if "lds" in figures:
        print(f"LDS {figures['lds']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}] (95 % interval)")
        unknown = "unknown: it takes --seeds 2 or more"
        print(f"Noise ceiling {unknown if math.isnan(figures['ceiling']) else format(figures['ceiling'], '.3f')}")
    if "auroc" in figures:
        print(f"Noisy-label AUROC {figures['auroc']:.3f} (self-influence), {figures['loss_auroc']:.3f} (training loss)")
    print(f"Published, {setting.published}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="DIR", help="folder with the data; a message says how to get them")
    source.add_argument("--stand-in", action="store_true", help="small data that ship with scikit-learn or Python")
    parser.add_argument("--subsets", type=int, help="half subsets of the ground truth; 0 retrains nothing")
    parser.add_argument("--seeds", type=int, help="trainings of each; the noise ceiling takes two")
    parser.add_argument("--flip", type=float, metavar="SHARE", help="share of training labels to flip")
    parser.add_argument("--accelerator", default="auto", help="of Lightning's Trainer (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        help="keeps the ground truth: a killed run goes on there, and several may fill it together "
        "(default: out/benchmarks/SETTING; of a stand-in nothing is kept)",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parsed = parser.parse_args(arguments)
    if parsed.subsets is not None and (parsed.subsets < 0 or parsed.subsets == 1):
        parser.error(f"expected --subsets to be 0, or 2 or more, but got {parsed.subsets}")
    if parsed.seeds is not None and parsed.seeds < 1:
        parser.error(f"expected --seeds to be 1 or more, but got {parsed.seeds}")
    if parsed.flip is not None and not 0 <= parsed.flip < 1:
        parser.error(f"expected --flip to be in [0, 1), but got {parsed.flip}")
    if parsed.flip and SETTINGS[parsed.setting].classes is None:
        parser.error(f"expected no --flip for {parsed.setting}, which has no labels")
    return parsed


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(arguments)
    if parsed.stand_in:
        torch.set_num_threads(1)  # on matrices as small as these, threads only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    setting = SETTINGS[parsed.setting]
    recipe = setting.stand_in_recipe if parsed.stand_in else setting.recipe
    asked = {name: getattr(parsed, name) for name in ("subsets", "seeds") if getattr(parsed, name) is not None}
    recipe = dataclasses.replace(recipe, **asked)
    flipped = setting.flipped if parsed.flip is None else parsed.flip
    try:
        pair = setting.stand_in() if parsed.stand_in else setting.read(parsed.data)
    except (MissingDataError, ValueError) as error:
        raise SystemExit(f"{parsed.setting}: {error}") from None
    with tempfile.TemporaryDirectory() as temporary:
        folder = parsed.out or (Path(temporary) if parsed.stand_in else Path("out/benchmarks") / parsed.setting)
        figures = measure(setting, recipe, pair, flipped, folder, parsed.accelerator)
    report(setting, recipe, figures, parsed.stand_in)
    if parsed.json:
        row = {"setting": parsed.setting, "stand_in": parsed.stand_in, "reduced": recipe.reduced, **figures}
        parsed.json.write_text(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
