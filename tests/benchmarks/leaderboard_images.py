"""The leaderboard without text: how well each method says what training a CNN again without some images does.

    python tests/benchmarks/leaderboard_images.py [--folder DIR] [--rows TEXT ...] [--quick] [--plot FILE]

BatchNorm, augmentation and momentum are in the run, see `leaderboard_digits.py`; the figures are those of
`leaderboard.py`, with margins in place of losses: QLD is how far a query's margin falls when the 1 % of images with the
highest scores for it have weight zero. bergson has no row here: it takes Hugging Face's language models.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from leaderboard import judged, loss_rises, path_of, plot, score, scored_by, table
from leaderboard_digits import EPOCHS, ImageBank, ImageData, Reader, load, margins, trained
from leaderboard_rows import DAMPINGS, Row
from leaderboard_text import FEW, N_TRAIN, random_removals, without
from torch import Tensor
from torch.nn import functional as F

from lightning_attr import AttributionTrainer, FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import (
    SOURCE,
    TRAK,
    Astra,
    AttributionMethod,
    GradCos,
    GradDot,
    Influence,
    TracIn,
    TrackStar,
)
from lightning_attr.parameters.weights import load_weights

FOLDER = Path("build") / "leaderboard-images"
SEED = 0
"""Of the recorded run, and of the removals that are judged first."""


def quiet_trainer(**options: Any) -> AttributionTrainer:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return AttributionTrainer(accelerator="cpu", max_epochs=EPOCHS, **dict.fromkeys(off, False), **options)


def recorded(run: Path) -> Reader:
    """Read the model at the end of the run."""
    module, store = Reader(SEED), FeatureStore.open(run)
    load_weights(module, store.weights(store.snapshots[-1].key))
    return module.eval()


def record(run: Path) -> None:
    """Train once with the callback; the bank's plain loop has to come to the same model."""
    callback = AttributionCallback(run, snapshots="start+geometric", featurize=False)
    module = Reader(SEED)
    quiet_trainer(callbacks=[callback]).fit(module, datamodule=ImageData(SEED))
    check_same(run, SEED)


def check_same(run: Path, seed: int) -> None:
    """See to it that the bank's plain loop, from a seed, comes to the model of the run."""
    again = margins(trained(torch.ones(N_TRAIN), seed))
    torch.testing.assert_close(margins(recorded(run).network), again, rtol=1e-4, atol=1e-4)


def attributed(run: Path, method: AttributionMethod) -> Tensor:
    """Score by a method on the recorded run."""
    options = {"model": recorded(run), "store": run, "method": method}
    scores: Tensor = quiet_trainer().attribute(ImageData(SEED), **options).scores.values
    return scores


def chance(run: Path) -> Tensor:
    x, _, x_query, _ = load()
    return torch.randn(len(x), len(x_query), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def similar(run: Path, layers: int) -> Tensor:
    """Cosines of what the network's first layers give; of the pixels for no layers."""
    x, _, x_query, _ = load()
    front = recorded(run).network[:layers]
    train, queries = (F.normalize(front(images).flatten(1), dim=1) for images in (x, x_query))
    return train @ queries.T


def damped(make: Callable[[float], AttributionMethod]) -> dict[float, Row]:
    return {damping: partial(attributed, method=make(damping)) for damping in DAMPINGS}


ROWS: dict[str, Row | dict[float, Row]] = {
    "random": chance,
    "similar pixels": partial(similar, layers=0),
    "embedding similarity": partial(similar, layers=-1),
    "GradDot": partial(attributed, method=GradDot(exact=True)),
    "GradCos": partial(attributed, method=GradCos(exact=True)),
    "TracIn": partial(attributed, method=TracIn(exact=True)),
    "TRAK()": partial(attributed, method=TRAK()),
    "TRAK(exact=True)": partial(attributed, method=TRAK(exact=True)),
    "TrackStar": partial(attributed, method=TrackStar()),
    "SOURCE": partial(attributed, method=SOURCE()),
    "SOURCE(momentum=0)": partial(attributed, method=SOURCE(optimizer="sgd", momentum=0.0)),
    "Influence, EK-FAC": damped(lambda damping: Influence(damping=damping)),
    "Influence, EK-FAC, all snapshots": damped(lambda damping: Influence(damping=damping, snapshots="all")),
    "Influence, Astra": damped(lambda damping: Influence(solver=Astra(), damping=damping, self_influence="ekfac")),
}


def scored(folder: Path, name: str, damping: object) -> tuple[Tensor, float, float] | None:
    """Score by a row in a process of its own; see `leaderboard.scored_by`."""
    command = [sys.executable, __file__, "--folder", str(folder), "--score", name, str(damping)]
    return scored_by(command, path_of(folder, name, damping), f"{name} (damping {damping})")


def measure(folder: Path, wanted: list[str], quick: bool) -> list[dict[str, Any]]:
    """All figures of all rows."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "run").exists():
        record(folder / "run")
    bank = ImageBank(folder)
    few = random_removals(20 if quick else 100, FEW, 1)
    truths = {"lds": (few, bank.outputs(few, SEED))}
    if not quick:
        half = random_removals(50, N_TRAIN // 2, 2)
        truths |= {"seed": (few, bank.outputs(few, SEED + 1)), "half": (half, bank.outputs(half, SEED))}
    whole = bank.outputs(without([])[None], SEED)[0]
    begin = time.process_time()
    trained(torch.ones(N_TRAIN), SEED)
    training = time.process_time() - begin
    rows = []
    for name in [name for name in ROWS if any(text in name for text in wanted)]:
        found = ROWS[name]
        tried = {damping: scored(folder, name, damping) for damping in (found if isinstance(found, dict) else [None])}
        rises = None if quick else partial(loss_rises, bank=bank, whole=whole)
        rows += judged(name, tried, truths, training, rises)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of what is kept (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", default=[""], help="only those with one of these texts in their names")
    parser.add_argument("--quick", action="store_true", help="20 removals, and no QLD")
    parser.add_argument("--plot", type=Path, help="write a picture of LDS against cost")
    parser.add_argument("--score", nargs=2, metavar=("ROW", "DAMPING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.score:
        score(ROWS, arguments.folder, *arguments.score)
        return
    L.seed_everything(SEED, verbose=False)
    rows = measure(arguments.folder, arguments.rows, arguments.quick)
    print(table(rows))
    (arguments.folder / "rows.json").write_text(json.dumps(rows, indent=1))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
