"""Trace the last note of a melody to the pieces that taught it, with a Music Transformer.

Each piece wanders over a scale and ends with a theme, in a rhythm of its own. The model hears all but the last note of
new pieces; the margin of that note, which dattri's benchmark attributes too, is traced to training pieces. Do they play
the theme? And did they teach the note: what if the model is trained without them, without random ones of the same
themes, or without any random ones? Run `python examples/music.py`; takes about a minute.
"""

import random
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch
from planted.facts import interval, quiet
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr import AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.evaluation import retrain_without

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from midi import NOTE_ON, Note, to_events
from music_transformer import MusicTransformer
from stand_ins import SCALE

THEMES, PIECES, NEW, LENGTH = 12, 16, 4, 48  # pieces and new pieces of each theme; events of a piece
ASKED, EPOCHS, REMOVED, SEEDS = 4, 14, 24, 3  # themes whose last notes are to be forgotten; pieces to remove
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
TONES = ["C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B"]


def theme(number: int) -> list[int]:
    """Eight degrees of a scale."""
    return random.Random(f"theme {number}").choices(range(7, 21), k=8)


def piece(number: int, seed: str) -> list[int]:
    """The events of a piece, up to the last note of its theme."""
    chance = random.Random(f"{number} {seed}")
    degrees = [*chance.choices(range(7, 21), k=12), *theme(number)]
    beat, time, notes = chance.choice((0.25, 0.4, 0.5)), 0.0, []
    for degree in degrees:
        duration = beat * chance.choice((0.5, 1, 1))
        pitch = 48 + 12 * (degree // 7 - 1) + SCALE[degree % 7]
        notes.append(Note(time, time + 0.9 * duration, pitch, chance.choice((60, 80))))
        time += duration
    events = to_events(notes)
    end = max(i for i, event in enumerate(events) if event < NOTE_ON + 128)
    return events[end - LENGTH : end + 1]


def names(events: Tensor) -> str:
    """The notes that are struck last, eight of them."""
    struck = [int(event) for event in events if event < NOTE_ON + 128]
    return " ".join(f"{TONES[pitch % 12]}{pitch // 12 - 1}" for pitch in struck[-8:])


def pieces(count: int, seed: str) -> tuple[TensorDataset, Tensor]:
    """Pieces of every theme, all but the last event of each and all but the first; and which theme it is."""
    themes = [number for number in range(THEMES) for _ in range(count)]
    events = torch.tensor([piece(number, f"{seed} {i}") for i, number in enumerate(themes)])
    return TensorDataset(events[:, :-1], events[:, 1:]), torch.tensor(themes)


class Melodies(L.LightningDataModule):
    """Training pieces, and new ones that play the same themes."""

    def __init__(self, seed: str = "") -> None:
        super().__init__()
        self.train_set, self.themes = pieces(PIECES, f"train {seed}")
        self.target_set, self.target_themes = pieces(NEW, f"target {seed}")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=16, shuffle=True)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.target_set, batch_size=32)


def model() -> MusicTransformer:
    return MusicTransformer(LENGTH, layers=2, heads=4, width=64, hidden=128, dropout=0.0, learning_rate=4e-3)


def main() -> None:
    quiet()
    L.seed_everything(0, verbose=False)
    data = Melodies()
    with tempfile.TemporaryDirectory() as folder:
        callback = AttributionCallback(f"{folder}/store")
        trainer = AttributionTrainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[callback], **QUIET)
        trainer.fit(model(), datamodule=data)
        result = trainer.attribute(data)
        with torch.no_grad():
            logits, last = trainer.lightning_module.eval().attribution_step(data.target_set.tensors)
        right = (logits.argmax(1) == last).double().mean()
        print(f"The last note of {len(last)} new pieces: {right:.0%} right")
        rows = result.scores.topk(10)[0]
        same = (data.themes[rows] == data.target_themes[:, None]).double().mean()
        chance = f"by chance {1 / THEMES:.0%}"
        print(
            f"Of their 10 top proponents among {len(data.themes)} pieces, {same:.0%} play the same theme ({chance})\n"
        )
        train, targets = ([names(row) for row in part.tensors[1]] for part in (data.train_set, data.target_set))
        print(result.proponent_texts(train, targets, targets=range(0, 2 * NEW, NEW), k=4))

        asked = data.target_themes < ASKED
        generator = torch.Generator().manual_seed(0)
        alike = (data.themes < ASKED).nonzero().flatten()
        sets = {
            "their top proponents": result.scores.values[:, asked].mean(1).topk(REMOVED).indices,
            "random ones of these themes": alike[torch.randperm(len(alike), generator=generator)[:REMOVED]],
            "random ones": torch.randperm(len(data.themes), generator=generator)[:REMOVED],
        }
        truth = retrain_without(
            model, lambda: L.Trainer(max_epochs=EPOCHS, accelerator="cpu", **QUIET), data, dirpath=f"{folder}/truth",
            index_sets=list(sets.values()), seeds=SEEDS, progress=False,
        )  # fmt: skip
    falls = truth.effects[..., asked].mean(2)
    print(
        f"\nFall of the margin of the last notes of {int(asked.sum())} new pieces if trained without {REMOVED} pieces,"
    )
    print(f"and how much more it is than without random ones; mean and 95 % interval, {SEEDS} seeds")
    for name, values in zip(sets, falls.T, strict=True):
        more = "" if name == "random ones" else interval(values - falls[:, -1])
        print(f"  {name:29s}{interval(values):25s}{more}".rstrip())


if __name__ == "__main__":
    main()
