"""Our default beside three peers on scikit-learn's digits, in all that retraining tells, as a table in Markdown.

    python tests/benchmarks/table.py [--setting mlp|cnn] [--rows TEXT] [--cache DIR] [--json FILE]

LDS: over 100 half subsets with 3 models each. AUROC: self-influence, against 10 % of labels flipped, of models trained
on them; plain training loss has a row of its own. Removal: points of test accuracy lost by retraining without the 10,
20 and 40 % of training samples of highest value, less what random samples lose, area under the curve; the value is our
`data_value`, and the mean score of the others, as they have none. Flipped: of
30 targets, those that retraining without their top 50 proponents gets wrong. Seconds: on one CPU thread, of training
and scores for 360 targets. captum and dattri score at the snapshots that our callback recorded in one run.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from digits import CACHE, SETTINGS, DigitsClassifier, DigitsData, Setting, ground_truth, load, margin, trained
from lightning_attr import AttributionTrainer, FeatureStore, ScoreMatrix
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.evaluation import proponent_sets
from lightning_attr.interop import dattri_task
from lightning_attr.metrics import data_selection_curve, linear_datamodeling_score, noisy_label_auroc
from lightning_attr.parameters.weights import load_weights

FLIPPED_LABELS = 0.1
FRACTIONS = (0.1, 0.2, 0.4)
SEEDS = 3
FLIP_TARGETS, FLIP_COUNT = 30, 50


class Data(NamedTuple):
    """Training samples, with their right labels or not, and targets."""

    x: Tensor
    y: Tensor
    x_target: Tensor
    y_target: Tensor


Scores = Callable[[Setting, Data], Tensor | ScoreMatrix]  # (n_train, n_target)


@contextmanager
def one_run(setting: Setting, data: Data) -> Any:
    """A run with our callback: its trainer, its module and its store."""
    with tempfile.TemporaryDirectory() as folder:
        L.seed_everything(0, verbose=False)
        datamodule, module = DigitsData(setting), DigitsClassifier(setting)
        datamodule.train_set = TensorDataset(data.x, data.y)
        datamodule.test_set = TensorDataset(data.x_target, data.y_target)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = AttributionTrainer(
            max_epochs=setting.epochs,
            accelerator="cpu",
            callbacks=[AttributionCallback(folder)],
            enable_progress_bar=False,
            **quiet,
        )
        trainer.fit(module, datamodule=datamodule)
        yield trainer, module.eval(), FeatureStore.open(folder)


def ours(setting: Setting, data: Data) -> ScoreMatrix:
    """The default."""
    with one_run(setting, data) as (trainer, _, _):
        scores: ScoreMatrix = trainer.attribute().scores
        return scores


def dattri_trak(setting: Setting, data: Data) -> Tensor:
    """Its TRAK at our snapshots."""
    from dattri.algorithm.trak import TRAKAttributor

    with one_run(setting, data) as (_, module, store):
        task = dattri_task(store, module, train="output")
        attributor = TRAKAttributor(
            task,
            lambda params, sample: task.original_target_func(params, sample).sigmoid(),
            projector_kwargs={"proj_dim": 512},
            regularization=1e-3,
        )
        loaders = [DataLoader(TensorDataset(*pair), len(pair[0])) for pair in (data[2:], data[:2])]
        return attributor.attribute(*loaders).detach()


def captum_tracin_fast(setting: Setting, data: Data) -> Tensor:
    """Its TracIn of the output layer at our snapshots; as it is written, positive scores are proponents."""
    from captum.influence import TracInCPFast

    with one_run(setting, data) as (_, module, store):

        def load_snapshot(model: nn.Module, key: str) -> float:
            load_weights(module, store.weights(key))
            return store.snapshot(key).learning_rate

        tracin = TracInCPFast(
            module,
            module.network[-1],
            TensorDataset(data.x, data.y),
            checkpoints=[snapshot.key for snapshot in store.snapshots],
            checkpoints_load_func=load_snapshot,
            loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            batch_size=len(data.x),
        )
        return tracin.influence((data.x_target, data.y_target)).T.contiguous()


def traker(setting: Setting, data: Data, n_models: int = 10, proj_dim: int = 512) -> Tensor:
    """TRAK's own code over models of different seeds; see lds.py."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    models = [trained(setting, data.x, data.y, seed) for seed in range(n_models)]
    size = sum(parameter.numel() for parameter in models[0].parameters())
    projector = BasicProjector(
        grad_dim=size, proj_dim=proj_dim, seed=0, proj_type=ProjectionType.rademacher, device="cpu"
    )
    with tempfile.TemporaryDirectory() as save_dir:
        trak = TRAKer(
            model=setting.network(),
            task="image_classification",
            train_set_size=len(data.x),
            save_dir=save_dir,
            device="cpu",
            projector=projector,
            use_half_precision=False,
            logging_level=logging.ERROR,
        )
        for model_id, model in enumerate(models):
            trak.load_checkpoint(model.state_dict(), model_id)
            trak.featurize((data.x, data.y), num_samples=len(data.x))
        trak.finalize_features()
        for model_id, model in enumerate(models):
            trak.start_scoring_checkpoint("digits", model.state_dict(), model_id, num_targets=len(data.x_target))
            trak.score((data.x_target, data.y_target), num_samples=len(data.x_target))
        return torch.tensor(trak.finalize_scores("digits"))


ROWS: dict[str, Scores] = {
    "ours: `TRAK()`, one run": ours,
    "traker, 10 models": traker,
    "dattri TRAK, the snapshots of one run": dattri_trak,
    "captum TracInCPFast, the snapshots of one run": captum_tracin_fast,
}


def flipped(data: Data) -> tuple[Data, Tensor]:
    """Training data with some labels flipped, which are the targets as well; and which labels are."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(len(data.y), generator=generator) < FLIPPED_LABELS
    shift = torch.randint(1, 10, (len(data.y),), generator=generator)
    y = torch.where(mask, (data.y + shift) % 10, data.y)
    return Data(data.x, y, data.x, y), mask


def accuracy_without(setting: Setting, data: Data, order: Callable[[int], Tensor]) -> Tensor:
    """Test accuracy, higher is better, of models retrained without the first samples, (SEEDS, len(FRACTIONS))."""
    found = torch.empty(SEEDS, len(FRACTIONS))
    for seed in range(SEEDS):
        for place, fraction in enumerate(FRACTIONS):
            kept = order(seed)[round(fraction * len(data.x)) :]
            model = trained(setting, data.x[kept], data.y[kept], seed)
            found[seed, place] = (model(data.x_target).argmax(1) == data.y_target).double().mean()
    return found


def random_order(seed: int) -> Tensor:
    """Training samples in random order."""
    return torch.randperm(len(load(SETTINGS["mlp"])[0]), generator=torch.Generator().manual_seed(seed))


def flip_rate(setting: Setting, data: Data, sets: list[list[int]], targets: list[int]) -> float:
    """Share of the targets that models retrained without their own set get wrong."""
    wrong = 0
    for target, removed in zip(targets, sets, strict=True):
        kept = torch.ones(len(data.x), dtype=torch.bool)
        kept[removed] = False
        model = trained(setting, data.x[kept], data.y[kept], seed=0)
        wrong += int(model(data.x_target[target : target + 1]).argmax() != data.y_target[target])
    return wrong / len(targets)


def as_matrix(scores: Tensor | ScoreMatrix) -> ScoreMatrix:
    return scores if isinstance(scores, ScoreMatrix) else ScoreMatrix(scores)


def measure(setting: Setting, wanted: str, cache: Path) -> list[dict[str, Any]]:
    """All figures of all rows."""
    x, x_target, y, y_target = load(setting)
    data = Data(x, y, x_target, y_target)
    noisy, mask = flipped(data)
    masks, outputs = ground_truth(setting, "report", cache)
    whole = trained(setting, x, y, seed=0)
    targets = (margin(whole(x_target), y_target) > 0).nonzero().flatten()[:FLIP_TARGETS].tolist()
    random_accuracy = accuracy_without(setting, data, random_order)
    random_sets = [random_order(target)[:FLIP_COUNT].tolist() for target in targets]
    loss = nn.functional.cross_entropy(trained(setting, x, noisy.y, 0)(x), noisy.y, reduction="none").detach()
    rows: list[dict[str, Any]] = []
    for name, attribute in tqdm(ROWS.items()):
        if wanted not in name:
            continue
        start = time.perf_counter()
        found = as_matrix(attribute(setting, data))
        seconds = time.perf_counter() - start
        scores = found.values
        lds = linear_datamodeling_score(scores, masks, outputs)
        best_first = found.data_value.argsort(descending=True)
        accuracy = accuracy_without(setting, data, lambda _, order=best_first: order)
        curve = data_selection_curve(torch.tensor(FRACTIONS), accuracy, random_accuracy, kind="remove")
        sets = proponent_sets(ScoreMatrix(scores), targets, [FLIP_COUNT])
        own = as_matrix(attribute(setting, noisy)).values.diagonal().contiguous()
        rows.append({
            "what": name,
            **{key: float(value) for key, value in zip(("lds", "low", "high", "ceiling"), lds, strict=False)},
            "auroc": float(noisy_label_auroc(own, mask)),
            "removal": 100 * float(curve.area),
            "removal_error": 100 * float(curve.area_error),
            "flipped": flip_rate(setting, data, sets, targets),
            "seconds": seconds,
        })
    rows.append({"what": "plain training loss", "auroc": float(noisy_label_auroc(loss, mask))})
    rows.append({"what": "random samples", "removal": 0.0, "flipped": flip_rate(setting, data, random_sets, targets)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| | LDS | AUROC | removal | flipped | seconds |", "|---|---|---|---|---|---|"]
    formats = {"auroc": "{:.3f}", "removal": "{:.1f}", "flipped": "{:.0%}", "seconds": "{:.1f}"}
    for row in rows:
        cells = {key: text.format(row[key]) if key in row else "" for key, text in formats.items()}
        if "lds" in row:
            cells["removal"] += f" ± {row['removal_error']:.1f}"
        lds = f"{row['lds']:.3f} ({row['low']:.3f} to {row['high']:.3f})" if "lds" in row else ""
        lines.append(f"| {row['what']} | {lds} | {' | '.join(cells.values())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="mlp")
    parser.add_argument("--rows", default="", help="only those with this text in their names")
    parser.add_argument("--cache", type=Path, default=CACHE, help="of the ground truth (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # the peers' and Lightning's own
    rows = measure(SETTINGS[arguments.setting], arguments.rows, arguments.cache)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
