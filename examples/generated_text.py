"""Trace sentences that a nanoGPT writes to the passages that taught it.

A nanoGPT of words learns sentences of Python's docstrings, and goes on from beginnings that many of them share. What it
then writes is in no data set. Its proponents are shown with the words that teach it; what if the model is trained
without them, without the passages that look most alike, or without random ones? Takes about a minute.
"""

import importlib
import inspect
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import lightning as L
import torch
from planted.facts import Sample, collate, encoded, interval, quiet, vocabulary
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_attr import AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.evaluation import retrain_without
from lightning_attr.methods import GradDot, Influence
from lightning_attr.modalities import HighlightedText, LossTokens, TextHighlights
from lightning_attr.outputs import LanguageModel

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from nanogpt import NanoGPT

MODULES = "builtins math cmath operator random statistics os shutil time datetime string collections functools"
LONGEST, OPENING, WRITTEN, SHOWN = 16, 3, 8, 2  # words of a passage and of a prompt; texts that are written and shown
EPOCHS, REMOVED, SEEDS = 16, 3, 3  # passages that are removed for each text
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
OUT = Path("out/generated_text")


def documentation() -> list[str]:
    """The sentences that open paragraphs of docstrings, in words that several of them have."""
    found = {}
    for module in map(importlib.import_module, MODULES.split()):
        owners = [vars(module), *(vars(owner) for owner in vars(module).values() if inspect.isclass(owner))]
        for documented in (each for owner in owners for each in owner.values() if callable(each)):
            for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(str(documented.__doc__))):
                sentence = re.match(r"[A-Z][\w\s,'-]+\.(?=\s|$)", paragraph)
                words = re.findall(r"[\w'-]+|[.,]", sentence[0].lower()) if sentence else []
                if 5 <= len(words) <= LONGEST:
                    found[" ".join(words)] = {*words}
    counts = Counter(word for words in found.values() for word in words)
    return [text for text, words in found.items() if min(counts[word] for word in words) > 1]


class Passages(L.LightningDataModule):
    """Training passages, and texts that were written, of which what comes after the prompt is measured."""

    def __init__(self, texts: list[str], written: list[str], codes: dict[str, int]) -> None:
        super().__init__()
        self.train_set = [{"input_ids": ids, "labels": ids} for ids in encoded(texts, codes)]
        masked = ((ids, F.pad(ids[OPENING:], (OPENING, 0), value=-100)) for ids in encoded(written, codes))
        self.target_set = [{"input_ids": ids, "labels": labels} for ids, labels in masked]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=16, shuffle=True, collate_fn=collate)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.target_set, batch_size=16, collate_fn=collate)


class LitNanoGPT(NanoGPT):
    """Attributes the log-probability of the words that have a label."""

    model_output = LanguageModel("loss")

    def __init__(self, words: int) -> None:
        super().__init__(words, block=LONGEST, layers=2, heads=4, width=64, dropout=0.0, learning_rate=8e-3)

    def attribution_step(self, batch: Sample) -> tuple[Tensor, Tensor]:
        return self(batch["input_ids"]), batch["labels"]

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        logits, labels = self.attribution_step(batch)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    @torch.no_grad()
    def write(self, prompt: str, codes: dict[str, int]) -> str:
        """Go on to the end of the sentence, with the likeliest words."""
        words, text = list(codes), prompt.split()
        while len(text) < LONGEST and text[-1] != ".":
            text.append(words[self(torch.stack(encoded([" ".join(text)], codes)))[0, -1].argmax()])
        return " ".join(text)


def by_words(model: LitNanoGPT, data: Passages, texts: list[str], written: list[str], top: tuple) -> TextHighlights:
    """Proponents of texts, and which words teach which: the losses of words alone, by the last weights' gradients."""
    blocks = []
    for j, (rows, scores) in enumerate(zip(*(part[:SHOWN].tolist() for part in top), strict=True)):
        sides = [data.train_set[i] for i in rows], [data.target_set[j]]
        taught, said = (DataLoader(LossTokens(own), batch_size=64, collate_fn=collate) for own in sides)
        trainer = AttributionTrainer(accelerator="cpu", **QUIET)
        shared = trainer.attribute(model=model, train_dataloaders=taught, target_dataloaders=said, method=GradDot())
        words = [re.findall(r" ?\S+", text) for text in (written[j], *(texts[i] for i in rows))]
        target = HighlightedText(words[0], [0.0] * OPENING + shared.scores.values.sum(0).tolist(), f"text #{j}")
        own = shared.scores.values.sum(1).split([len(text) - 1 for text in words[1:]])  # a first word has no loss
        marked = zip(words[1:], own, rows, scores, strict=True)
        blocks.append((target, [HighlightedText(w, [0.0, *p.tolist()], f"#{i}", score) for w, p, i, score in marked]))
    return TextHighlights(blocks)


def main() -> None:
    quiet()
    texts = documentation()
    codes = vocabulary(texts)
    L.seed_everything(2, verbose=False)
    model = LitNanoGPT(len(codes))
    openings = Counter(" ".join(text.split()[:OPENING]) for text in texts).most_common(60)
    fit = {"max_epochs": EPOCHS, "gradient_clip_val": 1.0, "accelerator": "cpu", **QUIET}
    with tempfile.TemporaryDirectory() as folder:
        method = Influence("empirical_fisher", damping=0.01, snapshots="all")
        trainer = AttributionTrainer(callbacks=[AttributionCallback(f"{folder}/store", method)], **fit)
        trainer.fit(model, datamodule=Passages(texts, texts[:1], codes))
        likeliest = (model.eval().write(opening, codes) for opening, _ in openings)
        written = [text for text in likeliest if not any(text in passage for passage in texts)][:WRITTEN]
        print(f"Texts that the model writes and none of its {len(texts)} passages holds:", *written, sep="\n  ")
        data = Passages(texts, written, codes)
        scores = trainer.attribute(data).scores
        highlights = by_words(model, data, texts, written, scores.topk(REMOVED))
        OUT.mkdir(parents=True, exist_ok=True)
        highlights.save(OUT / "proponents.html")
        print(f"\n{highlights}\nThe same for a browser: {OUT / 'proponents.html'}")
        bags, own = ([{*text.split()} for text in side] for side in (texts, written))
        alike = torch.tensor([[len(text & bag) / len(text | bag) for bag in bags] for text in own])
        proponents = scores.topk(REMOVED)[0].unique()
        random = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[: len(proponents)]
        truth = retrain_without(
            lambda: LitNanoGPT(len(codes)), lambda: L.Trainer(**fit), data, dirpath=f"{folder}/truth",
            index_sets=[proponents, alike.topk(REMOVED)[1].unique(), random], seeds=SEEDS, progress=False,
        )  # fmt: skip
    falls = truth.effects.mean(2)
    print(f"\nFall of log-probability without some passages, and more than without random ones ({SEEDS} seeds, 95 %)")
    for name, removed, values in zip(("their proponents", "most alike", "random"), truth.removed, falls.T, strict=True):
        more = "" if name == "random" else interval(values - falls[:, -1])
        print(f"  {len(removed)} passages, {name:18s}{interval(values):24s} {more}".rstrip())


if __name__ == "__main__":
    main()
