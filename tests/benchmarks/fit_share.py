"""Which share of a training's time the callback takes, with its default schedule, on the digits CNN from end to end.

Run `python tests/benchmarks/fit_share.py [--repeats N] [--setting cnn | mlp] [--exact] [--json FILE] [--profile]`. With
`--exact` the method is `TRAK(exact=True)`, for which the callback stores the weights only. Trainings with and without
the callback alternate, from the same seeds; the share is 1 - (time without) / (time with), the median over the pairs.
`--profile` prints instead where the callback's time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import logging
import pstats
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from digits import SETTINGS, DigitsClassifier, DigitsData, Setting
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK

SEED = 0


def fit(setting: Setting, method: TRAK | None, epochs: int) -> tuple[float, torch.Tensor]:
    """Train from the seed; seconds of `Trainer.fit`, and the weights at its end."""
    L.seed_everything(SEED, verbose=False)
    module, data = DigitsClassifier(setting), DigitsData(setting)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=epochs,
            callbacks=[] if method is None else [AttributionCallback(Path(folder) / "store", method)],
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = time.perf_counter()
        trainer.fit(module, data)
        elapsed = time.perf_counter() - start
    return elapsed, torch.cat([p.detach().flatten() for p in module.parameters()])


def profile(setting: Setting, method: TRAK, epochs: int, lines: int = 30) -> None:
    """Print what runs longest inside the callback, by cumulated time."""
    profiler = cProfile.Profile()
    profiler.enable()
    fit(setting, method, epochs)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("cumulative").print_stats("lightning_attr|callbacks", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="cnn")
    parser.add_argument("--epochs", type=int, help="by default those of the recipe")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--exact", action="store_true", help="TRAK without projection")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # Lightning's advice on workers
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    setting = SETTINGS[arguments.setting]
    epochs = arguments.epochs or setting.epochs
    method = TRAK(exact=arguments.exact)
    fit(setting, method, 1)  # warm-up: imports, kernels

    if arguments.profile:
        profile(setting, method, epochs)
        return
    pairs: list[tuple[float, float]] = []
    for i in range(arguments.repeats):
        order = (True, False) if i % 2 else (False, True)
        found = {callback: fit(setting, method if callback else None, epochs) for callback in order}
        assert torch.equal(found[True][1], found[False][1])  # the callback has changed nothing
        pairs.append((found[True][0], found[False][0]))
    shares = sorted(1 - without / with_it for with_it, without in pairs)
    row: dict[str, Any] = {
        "what": f"digits {setting.name}, {epochs} epochs: share of fit time that the callback takes",
        "figure": statistics.median(with_it for with_it, _ in pairs),
        "reference": statistics.median(without for _, without in pairs),
        "ratio": statistics.median(shares),
        "lowest": shares[0],
        "highest": shares[-1],
        "threads": arguments.threads,
    }
    print(
        f"digits {setting.name}, {epochs} epochs, {arguments.threads} thread(s): {row['reference']:.2f} s without, "
        f"{row['figure']:.2f} s with the callback; its share {100 * row['ratio']:.1f} % (median of {len(pairs)} pairs, "
        f"{100 * shares[0]:.1f} to {100 * shares[-1]:.1f})"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps([row], indent=1))


if __name__ == "__main__":
    main()
