"""Test accuracy after retraining on what selection keeps, of clean and noisy digits, beside rankings that cost nothing.

    python tests/benchmarks/selection.py [--noise clean random systematic] [--seeds 1 2 3] [--json FILE] [--show FILE]

1,000 training samples with right labels, 10 % of them flipped at random, or up to 20 % mistaken by kind (of each class
the largest of five clusters bears the next class's label); 297 targets with right labels, which only attribution to
targets uses; 500 others to test. One recorded run ranks. A tenth is dropped, a fifth where a fifth may be wrong, or all
but a fifth. Models are retrained twice a seed, with as many steps as on all samples. Seed 0 chose the scale of the
coreset. `--show` prints the table of rows that were written before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from sklearn.cluster import KMeans  # type: ignore[import-untyped]  # ships no types
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # ships no types
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]  # ships no types
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from digits import SETTINGS, DigitsMLP, trained
from lightning_attr import AttributionResult, AttributionTrainer, FeatureStore
from lightning_attr.callbacks import AttributionCallback, DataCuration
from lightning_attr.parameters.weights import load_weights

SETTING = SETTINGS["mlp"]
NOISE = {"clean": 0.0, "random": 0.1, "systematic": 0.2}
DROPPED = {"clean": 0.1, "random": 0.1, "systematic": 0.2}
CORE, CURATED_FROM = 0.2, 5
RETRAININGS = 2
EARLY = 3  # snapshots of EL2N


class Data(NamedTuple):
    """Training samples with the labels they bear and the right ones; targets; test samples."""

    x: Tensor
    y: Tensor
    right: Tensor
    x_target: Tensor
    y_target: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def wrong(self) -> Tensor:
        return self.y != self.right


def data_of(noise: str, seed: int) -> Data:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels / 16).float(), torch.from_numpy(labels)
    x, others, right, other_labels = train_test_split(x, y, train_size=1000, random_state=seed)
    x_target, x_test, y_target, y_test = train_test_split(others, other_labels, test_size=500, random_state=seed)
    generator, y = torch.Generator().manual_seed(seed), right.clone()
    if noise == "random":
        rows = torch.randperm(len(y), generator=generator)[: round(NOISE[noise] * len(y))]
        y[rows] = (y[rows] + torch.randint(1, 10, rows.shape, generator=generator)) % 10
    for label in range(10) if noise == "systematic" else ():
        members = (right == label).nonzero().flatten()
        cluster = torch.from_numpy(KMeans(5, n_init=3, random_state=seed).fit(x[members]).labels_).long()
        largest = members[cluster == cluster.bincount().argmax()]
        y[largest[: round(NOISE[noise] * len(members))]] = (label + 1) % 10
    return Data(x, y, right, x_target, y_target, x_test, y_test)


class Run(NamedTuple):
    """A recorded run: its result, its store, and its module."""

    result: AttributionResult
    store: FeatureStore
    module: DigitsMLP


def fit(data: Data, seed: int, folder: Path, *callbacks: Any) -> tuple[Any, DigitsMLP]:
    L.seed_everything(seed, verbose=False)
    recorder = AttributionCallback(folder, noise_mask=data.wrong)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = AttributionTrainer(
        max_epochs=SETTING.epochs,
        accelerator="cpu",
        enable_checkpointing=False,
        callbacks=[recorder, *callbacks],
        **quiet,
    )
    module = DigitsMLP()
    trainer.fit(module, loader(data, shuffle=True))
    return trainer, module


def loader(data: Data, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(data.x, data.y), SETTING.batch_size, shuffle=shuffle)


def accuracy(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return (model.eval()(data.x_test).argmax(1) == data.y_test).double().mean().item()


def retrained(data: Data, keep: Tensor, seed: int) -> tuple[float, float]:
    """Mean test accuracy, and mean loss of the targets, with as many steps as on all samples."""
    setting = dataclasses.replace(SETTING, epochs=max(1, round(SETTING.epochs * len(data.x) / len(keep))))
    models = [trained(setting, data.x[keep], data.y[keep], 1000 * seed + again) for again in range(RETRAININGS)]
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(data.x_target), data.y_target).item() for model in models]
    return statistics.mean(accuracy(model, data) for model in models), statistics.mean(losses)


def dynamics(run: Run, data: Data) -> tuple[Tensor, Tensor]:
    """EL2N (Paul et al., 2021), the error norm early on, and how often a sample was forgotten (Toneva et al., 2019)."""
    norms, right, target = [], [], nn.functional.one_hot(data.y, 10)
    for snapshot in run.store.snapshots:
        load_weights(run.module, run.store.weights(snapshot.key))
        with torch.no_grad():
            outputs = run.module(data.x)
        norms.append((outputs.softmax(1) - target).norm(dim=1))
        right.append(outputs.argmax(1) == data.y)
    correct = torch.stack(right)
    forgotten = (correct[:-1] & ~correct[1:]).sum(0) + len(correct) * ~correct.any(0)  # never learned comes last
    return torch.stack(norms[:EARLY]).mean(0), forgotten + torch.stack(norms).mean(0) / 10


def captum(run: Run, data: Data) -> Tensor:
    """Mean score of its TracIn of the output layer at our snapshots."""
    from captum.influence import TracInCPFast

    def load_snapshot(model: nn.Module, key: str) -> float:
        load_weights(run.module, run.store.weights(key))
        return run.store.snapshot(key).learning_rate

    tracin = TracInCPFast(
        run.module,
        run.module.network[-1],
        TensorDataset(data.x, data.y),
        checkpoints=[snapshot.key for snapshot in run.store.snapshots],
        checkpoints_load_func=load_snapshot,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=len(data.x),
    )
    scores: Tensor = tracin.influence((data.x_target, data.y_target))
    return scores.mean(0)


def by_class(value: Tensor, y: Tensor, fraction: float) -> Tensor:
    members = [(y == label).nonzero().flatten() for label in y.unique()]
    return torch.cat([rows[value[rows].topk(round(fraction * len(rows))).indices] for rows in members])


def choices(run: Run, data: Data, seed: int, share: float) -> dict[str, tuple[Tensor, Tensor]]:
    """What each arm keeps: this share, and a fifth."""
    result, n = run.result, len(data.x)
    el2n, forgotten = dynamics(run, data)
    tracin = captum(run, data)
    chance = torch.rand(n, generator=torch.Generator().manual_seed(seed))

    def top(value: Tensor, core: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return value.topk(round(share * n)).indices, (value if core is None else core).topk(round(CORE * n)).indices

    def classes(value: Tensor) -> tuple[Tensor, Tensor]:
        return by_class(value, data.y, share), by_class(value, data.y, CORE)

    return {
        '`objective="prune"`, `objective="coreset"`': (
            result.select(share, objective="prune"),
            result.select(CORE, objective="coreset"),
        ),
        "the same, `per_class=True`": (
            result.select(share, objective="prune", per_class=True),
            result.select(CORE, objective="coreset", per_class=True),
        ),
        'ranking `by="data_value"`': (result.select(share), result.select(CORE)),
        "the same, `per_class=True`, ranking": (
            result.select(share, per_class=True),
            result.select(CORE, per_class=True),
        ),
        "self-influence: lowest; to a fifth: highest": top(-result.self_influence, result.self_influence),
        "training loss: lowest; to a fifth: highest": top(-result.loss, result.loss),
        "training loss: lowest of each class": classes(-result.loss),
        "EL2N: lowest; to a fifth: highest": top(-el2n, el2n),
        "forgetting: least; to a fifth: most": top(-forgotten, forgotten),
        "captum TracInCPFast: highest": top(tracin),
        "captum TracInCPFast: highest of each class": classes(tracin),
        "random": top(chance),
        "random of each class": classes(chance),
        "(right labels)": ((~data.wrong).nonzero().flatten(), by_class(chance - 2.0 * data.wrong, data.y, CORE)),
    }


def measure(noise: str, seed: int) -> list[dict[str, Any]]:
    """A row for each arm: test accuracies, shares of wrong labels, predicted and measured change of the loss."""
    data, rows = data_of(noise, seed), []
    with tempfile.TemporaryDirectory() as name:
        trainer, module = fit(data, seed, Path(name) / "run")
        as_it_was = accuracy(module, data)
        targets = DataLoader(TensorDataset(data.x_target, data.y_target), 297)
        result = trainer.attribute(train_dataloaders=loader(data), target_dataloaders=targets)
        run = Run(result, FeatureStore.open(Path(name) / "run"), module)
        whole, loss_before = retrained(data, torch.arange(len(data.x)), seed)
        rows.append({"arm": "(all samples)", "pruned": whole, "core": whole})
        for arm, (pruned, core) in choices(run, data, seed, 1 - DROPPED[noise]).items():
            (accuracy_pruned, loss), (accuracy_core, _) = retrained(data, pruned, seed), retrained(data, core, seed)
            effect = run.result.predicted_effect(pruned)
            row = {"arm": arm, "pruned": accuracy_pruned, "core": accuracy_core, "kept": len(pruned)}
            row |= {"predicted": float(effect.loss), "error": float(effect.loss_error), "measured": loss - loss_before}
            row |= {
                "wrong": float(data.wrong[pruned].double().mean()),
                "wrong_core": float(data.wrong[core].double().mean()),
            }
            rows.append(row)
        rows.append({"arm": "`DataCuration`: not acting", "curated": as_it_was})
        for by in ("self_influence", "loss"):
            curation = DataCuration(CURATED_FROM, DROPPED[noise], by)
            model = fit(data, seed, Path(name) / by, curation)[1]
            wrong = float(data.wrong[curation.left_out].double().mean())
            rows.append({"arm": f"`DataCuration(by={by!r})`", "curated": accuracy(model, data), "wrong": wrong})
    return [{"noise": noise, "seed": seed, **row} for row in rows]


def cell(rows: list[dict[str, Any]], key: str) -> str:
    """Mean over seeds and its standard error."""
    values = [row[key] for row in rows if key in row]
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"


def show(rows: list[dict[str, Any]]) -> None:
    kinds = [noise for noise in NOISE if any(row["noise"] == noise for row in rows)]
    parts = {"pruned": "drops 10, 10, 20 %", "core": f"keeps {CORE:.0%}", "curated": "while training"}
    for key, part in parts.items():
        print(f"\n| {part} | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
        for arm in dict.fromkeys(row["arm"] for row in rows if key in row):
            own = [[row for row in rows if (row["arm"], row["noise"]) == (arm, noise)] for noise in kinds]
            print(f"| {arm} | {' | '.join(cell(part, key) for part in own)} |")
    both = torch.tensor([[row["predicted"], row["measured"]] for row in rows if "predicted" in row]).T
    signs = (both[0].sign() == both[1].sign()).double().mean()
    correlation = torch.corrcoef(both)[0, 1]
    print(f"\nPredicted and measured change of the targets' loss: correlation {correlation:.2f}, same sign {signs:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", nargs="+", choices=NOISE, default=list(NOISE))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", nargs="+", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|captum")
    if options.show:
        rows = [row for file in options.show for row in json.loads(file.read_text())]
    else:
        rows = [row for noise in options.noise for seed in options.seeds for row in measure(noise, seed)]
    if options.json:
        options.json.write_text(json.dumps(rows))
    show(rows)


if __name__ == "__main__":
    main()
