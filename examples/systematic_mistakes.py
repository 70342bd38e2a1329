"""Trace wrong predictions to the systematic mistakes behind them, correct these, and retrain: the errors go.

Two mistakes are planted in scikit-learn's digits. A scanner left a faint mark on some images, and whatever bears it was
filed under "3". A labeller took one way of writing a 4 for a 9. The model learns both: their loss is low, and marked
images of other digits are read as 3. Some test images leaked into the training set besides: who looks for copies is
served better by the nearest pixels, and the demo says so. Run `python examples/systematic_mistakes.py`; the page goes
to `out/systematic_mistakes/`. Takes less than a minute.
"""

import argparse
import logging
import shutil
import warnings
from pathlib import Path

import lightning as L
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr import AttributionMixin, AttributionResult, AttributionTrainer
from lightning_attr.callbacks import AttributionCallback

OUT = Path("out/systematic_mistakes")
EPOCHS, RETRAININGS, SIZE, MARKED, CONFUSED, LEAKED = 20, 2, 10, 40, 0.8, 15
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}


class LitClassifier(AttributionMixin, L.LightningModule):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.Flatten()),
        )
        self.head = nn.Linear(32 * (SIZE // 2) ** 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=EPOCHS - 1)]


class Digits:
    """1,197 training images with the two mistakes, and 600 test images with right labels, 100 of them marked.

    Copies of 15 test images without a mark, with their labels, are the last training images.
    """

    def __init__(self, seed: int) -> None:
        images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
        x, test_x, y, self.test_y = train_test_split(images.float() / 16, labels, test_size=600, random_state=seed)
        generator = torch.Generator().manual_seed(seed)
        fours = (y == 4).nonzero().flatten()
        way = torch.tensor(KMeans(3, n_init=4, random_state=seed).fit(x[fours]).labels_)
        fours = fours[way == way.bincount().argsort()[1]]
        confused = fours[torch.randperm(len(fours), generator=generator)[: round(CONFUSED * len(fours))]]
        marked, test_marked = (_some(own != 3, n, generator) for own, n in ((y, MARKED), (self.test_y, 100)))
        self.x, self.test_x = _scan(x, marked, generator), _scan(test_x, test_marked, generator)
        self.leaked = _some(~torch.isin(torch.arange(len(test_x)), test_marked), LEAKED, generator)
        self.x = torch.cat([self.x, self.test_x[self.leaked]])
        self.right = torch.cat([y, self.test_y[self.leaked]])
        self.y = self.right.clone()
        self.y[confused], self.y[marked] = 9, 3
        self.by_scanner, self.test_marked = (
            torch.isin(torch.arange(len(a)), rows) for a, rows in ((self.y, marked), (test_x, test_marked))
        )
        self.planted = self.by_scanner | torch.isin(torch.arange(len(self.y)), confused)


def _some(allowed: Tensor, count: int, generator: torch.Generator) -> Tensor:
    rows = allowed.nonzero().flatten()
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def _scan(x: Tensor, marked: Tensor, generator: torch.Generator) -> Tensor:
    """Put each digit somewhere on a larger canvas, and leave two faint dots on the upper edge of the marked ones."""
    canvas = torch.zeros(len(x), 1, SIZE, SIZE)
    for image, digit, (i, j) in zip(canvas, x, torch.randint(SIZE - 7, (len(x), 2), generator=generator), strict=True):
        image[0, i : i + 8, j : j + 8] = digit.view(8, 8)
    for i, j in zip(marked, torch.randint(SIZE - 2, (len(marked),), generator=generator), strict=True):
        canvas[i, 0, 0, j : j + 3] = torch.tensor([0.7, 0.0, 0.7])
    return canvas


def loader(x: Tensor, y: Tensor, shuffle: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=64, shuffle=shuffle)


def read(model: LitClassifier, x: Tensor) -> Tensor:
    """The class that the model sees in each image."""
    with torch.no_grad():
        return model.eval()(x).argmax(1)


def likeness(a: Tensor, b: Tensor) -> Tensor:
    """Minus the distance of each pair."""
    return -torch.cdist(a.flatten(1), b.flatten(1))


def votes(scores: Tensor) -> Tensor:
    """How often each training sample is among the ten highest of a target; ties go by the mean."""
    highest = scores.topk(10, dim=0).indices
    return highest.flatten().bincount(minlength=len(scores)) + 1e-6 * scores.mean(1)


def errors_after(data: Digits, corrected: Tensor, seed: int) -> tuple[float, float]:
    """Correct these labels, where they are wrong, and retrain: errors among the marked test images, and all others."""
    L.seed_everything(seed, verbose=False)
    model, y = LitClassifier(), data.y.clone()
    y[corrected] = data.right[corrected]
    L.Trainer(max_epochs=EPOCHS, accelerator="cpu", **QUIET).fit(model, loader(data.x, y, shuffle=True))
    wrong = read(model, data.test_x) != data.test_y
    return wrong[data.test_marked].double().mean().item(), wrong[~data.test_marked].double().mean().item()


def trained(data: Digits, seed: int, folder: Path) -> tuple[AttributionTrainer, LitClassifier]:
    """Train once, with the callback."""
    L.seed_everything(seed, verbose=False)
    model = LitClassifier()
    recorder = AttributionCallback(folder / "attribution", noise_mask=data.planted)
    trainer = AttributionTrainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[recorder], **QUIET)
    trainer.fit(model, loader(data.x, data.y, shuffle=True))
    return trainer, model


def trace(
    data: Digits, trainer: AttributionTrainer, model: LitClassifier, x: Tensor, said: Tensor
) -> tuple[AttributionResult, dict[str, Tensor]]:
    """Find what is behind images with these labels, by attribution and by likeness."""
    result = trainer.attribute(train_dataloaders=loader(data.x, data.y), target_dataloaders=loader(x, said))
    with torch.no_grad():
        pixels, features = likeness(data.x, x), likeness(model.body(data.x), model.body(x))
    other = data.y[:, None] != said  # neighbours get a hint: only those that bear the label
    behind = {
        "attribution": result.scores.values,
        "nearest in pixels": pixels.masked_fill(other, -1e3),
        "nearest in features": features.masked_fill(other, -1e3),
    }
    return result, behind


def print_copies(data: Digits, behind: dict[str, Tensor]) -> None:
    print(f"\n{LEAKED} test images leaked into the training set. Share of them whose copy is found")
    print(f"  {'':40s}{'first':>20s}{'among five':>20s}")
    copies = len(data.y) - LEAKED + torch.arange(LEAKED)
    for name, scores in behind.items():
        found = scores.topk(5, dim=0).indices == copies
        print(f"  {name:40s}{found[0].double().mean():20.2f}{found.any(0).double().mean():20.2f}")


def print_behind_errors(data: Digits, behind: dict[str, Tensor], groups: dict[str, Tensor]) -> None:
    print("\nThe five training images behind each such error: share of planted mistakes")
    print(f"  {'':40s}" + "".join(f"{name:>20s}" for name in groups))
    for name, scores in behind.items():
        first = [scores[:, group].topk(5, dim=0).indices for group in groups.values()]
        print(f"  {name:40s}" + "".join(f"{data.planted[rows].double().mean():20.2f}" for rows in first))


def print_corrections(data: Digits, result: AttributionResult, behind: dict[str, Tensor]) -> None:
    """Look at as many training images as there are mistakes, chosen in different ways; correct, and retrain."""
    n, none = int(data.planted.sum()), torch.tensor([], dtype=torch.int64)
    order = {
        "attribution, mean over the errors": behind["attribution"].mean(1),
        "nearest in pixels, most often in ten": votes(behind["nearest in pixels"]),
        "nearest in features, most often in ten": votes(behind["nearest in features"]),
        "training loss": result.loss,
        "self-influence": result.self_influence,
        "random": torch.rand(len(data.y)),
    }
    chosen = {name: values.topk(n).indices for name, values in order.items()}
    chosen |= {"(nothing)": none, "(all planted mistakes)": data.planted.nonzero().flatten()}
    print(
        f"\n{n} training images are looked at, the wrong labels corrected, and the model retrained {RETRAININGS} times"
    )
    print(f"  {'chosen by':40s}    wrong among them   errors: marked   others")
    for name, rows in chosen.items():
        share = data.planted[rows].double().mean().nan_to_num()
        errors = torch.tensor([errors_after(data, rows, 100 + again) for again in range(RETRAININGS)]).mean(0)
        print(f"  {name:40s}{share:20.2f}{errors[0]:17.3f}{errors[1]:9.3f}", flush=True)


def demo(seed: int, folder: Path) -> None:
    data = Digits(seed)
    trainer, model = trained(data, seed, folder)
    predicted = read(model, data.test_x)
    wrong = (predicted != data.test_y).nonzero().flatten()
    x, said, true = data.test_x[wrong], predicted[wrong], data.test_y[wrong]
    # A target is a wrong image with the label that the model gave it: what made the model say so?
    result, behind = trace(data, trainer, model, x, said)
    groups = {"marked, read as 3": data.test_marked[wrong] & (said == 3), "4, read as 9": (true == 4) & (said == 9)}
    kinds = " and ".join(f"{int(group.sum())} of the kind “{name}”" for name, group in groups.items())
    print(f"Seed {seed}: {len(wrong)} of {len(data.test_y)} test images are read wrongly, {kinds}.")
    print_behind_errors(data, behind, groups)
    print_corrections(data, result, behind)
    _, of_leaked = trace(data, trainer, model, data.test_x[data.leaked], data.test_y[data.leaked])
    print_copies(data, of_leaked)

    train = TensorDataset(data.x, data.y)
    figure, _ = result.plot_proponents(data.x, x, targets=[int(group.int().argmax()) for group in groups.values()])
    figure.savefig(folder / "proponents.png")
    outputs = [f"read as {read_as}, is {label}" for read_as, label in zip(said, true, strict=True)]
    page = result.report(
        folder / "report.html", train, TensorDataset(x, said), outputs=outputs, title="What made the model say so?"
    )
    print(
        f"\nEach wrong image beside what made the model say so: open {page}. As a figure: {folder / 'proponents.png'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1], help="of split, mistakes and training; 0 chose the setting"
    )
    torch.set_num_threads(1)  # on images as small as these, threads only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    shutil.rmtree(OUT, ignore_errors=True)
    for seed in parser.parse_args().seeds:
        demo(seed, OUT / f"seed-{seed}")


if __name__ == "__main__":
    main()
