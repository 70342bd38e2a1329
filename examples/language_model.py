"""Trace what a GPT-2 says to the sentences that taught it, and make it forget.

A small GPT-2 learns where people come from, each fact from five sentences that differ, among sentences of Python's
documentation. Prompted with a name it says a place, which is attributed. Do the proponents state the fact? And are they
what made the model say it: what if it is trained without them, without all that state the fact, or without random ones?
Run `python examples/language_model.py`; takes about a minute.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from planted.facts import Sample, collate, documentation, encoded, interval, planted, quiet, vocabulary
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_attr import AttributionMixin, AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.evaluation import retrain_without
from lightning_attr.methods import GradDot
from lightning_attr.metrics import mean_reciprocal_rank, recall_at_k
from lightning_attr.modalities import HighlightedText, LossTokens, TextHighlights
from lightning_attr.outputs import LanguageModel

EPOCHS, ASKED, REMOVED, SEEDS = 40, 6, 5, 3
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
OUT = Path("out/language_model")


class Sentences(L.LightningDataModule):
    """Texts, and targets of which the last word is measured, as transformers takes them."""

    def __init__(self, texts: list[str], targets: list[str], codes: dict[str, int]) -> None:
        super().__init__()
        self.codes = codes
        self.train_set = [{"input_ids": ids, "labels": ids} for ids in encoded(texts, codes)]
        self.target_set = [
            {"input_ids": ids, "labels": ids.where(torch.arange(len(ids)) == len(ids) - 1, -100)}
            for ids in encoded(targets, codes)
        ]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=16, shuffle=True, collate_fn=collate)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.target_set, batch_size=32, collate_fn=collate)


class LitGPT2(AttributionMixin, L.LightningModule):
    """Attributes the log-probability of the words that have a label."""

    model_output = LanguageModel("loss")
    learning_rate, epochs = 1e-2, EPOCHS

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        sizes = {"vocab_size": vocabulary, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 4}
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(**sizes, **no_dropout, bos_token_id=None, eos_token_id=None, use_cache=False)
        self.gpt2 = GPT2LMHeadModel(config)

    def forward(self, **batch: Tensor) -> Any:
        return self.gpt2(**batch)

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        return self(**batch).loss

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=self.epochs - 1)]

    def continued(self, text: str, codes: dict[str, int]) -> str:
        """The text with another last word, the one that the model generates."""
        prompt = text.rsplit(" ", 1)[0]
        ids = torch.stack(encoded([prompt], codes))
        found = self.gpt2.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False
        )
        return f"{prompt} {list(codes)[found[0, -1]]}"


def by_words(model: LitGPT2, data: Sentences, texts: list[str], said: list[str], top: Any) -> TextHighlights:
    """Proponents of the first target, and the words that teach it: each word's loss alone, at the last weights."""
    rows, scores = (part[0].tolist() for part in top)
    tokens = LossTokens([data.train_set[i] for i in rows])
    contributions = AttributionTrainer(accelerator="cpu", **QUIET).attribute(
        model=model,
        train_dataloaders=DataLoader(tokens, batch_size=32, collate_fn=collate),
        target_dataloaders=DataLoader(data.target_set[:1], collate_fn=collate),
        method=GradDot(),
    )
    words = [re.findall(r" ?\S+", text) for text in (said[0], *(texts[i] for i in rows))]
    parts = contributions.scores.values[:, 0].split([len(own) - 1 for own in words[1:]])  # no loss for a first word
    target = HighlightedText(words[0], [0.0] * (len(words[0]) - 1) + [1.0], "target #0")
    proponents = [
        HighlightedText(own, [0.0, *part.tolist()], f"#{i}", score)
        for own, part, i, score in zip(words[1:], parts, rows, scores, strict=True)
    ]
    return TextHighlights([(target, proponents)])


def main() -> None:
    quiet()
    told, asked, telling = planted()
    texts = told + documentation()
    codes = vocabulary(texts)
    L.seed_everything(0, verbose=False)
    model, data = LitGPT2(len(codes)), Sentences(texts, asked, codes)
    with tempfile.TemporaryDirectory() as folder:
        callback = AttributionCallback(f"{folder}/store")
        trainer = AttributionTrainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[callback], **QUIET)
        trainer.fit(model, datamodule=data)
        said = [model.eval().continued(text, codes) for text in asked]
        data = Sentences(texts, said, codes)
        result = trainer.attribute(data)
        right = sum(map(str.__eq__, said, asked))
        print(f"{len(texts)} sentences, {len(telling[0])} state each fact; {right} of {len(said)} prompts continued so")

        common = torch.tensor([[len({*text.split()} & {*target.split()}) for target in said] for text in texts])
        print("\nSentences that state the fact   mean reciprocal rank   Recall@10")
        for name, scores in {"found by TRAK": result.scores.values, "by words in common": common.float()}.items():
            rank, recall = mean_reciprocal_rank(scores, telling).mean, recall_at_k(scores, telling, k=10).mean
            print(f"  {name:28s} {rank:21.2f} {recall:11.2f}")
        highlights = by_words(model, data, texts, said, result.scores.topk(REMOVED))
        OUT.mkdir(parents=True, exist_ok=True)
        highlights.save(OUT / "proponents.html")
        print(f"\n{highlights}\nThe same for a browser: {OUT / 'proponents.html'}")

        random = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
        sets = [result.scores.topk(REMOVED)[0][:ASKED].unique(), torch.tensor(telling[:ASKED]).flatten()]
        factories = lambda: LitGPT2(len(codes)), lambda: L.Trainer(max_epochs=EPOCHS, accelerator="cpu", **QUIET)
        truth = retrain_without(
            *factories, data, dirpath=f"{folder}/truth", index_sets=[*sets, random[: len(sets[0])]], seeds=SEEDS,
            progress=False,
        )  # fmt: skip
    likely = truth.outputs.exp()  # a probability is bounded: no single model decides
    falls, others = ((likely[:, :1] - likely[:, 1:])[..., part].mean(2) for part in (slice(ASKED), slice(ASKED, None)))
    full = likely[:, 0, :ASKED].mean()
    print(
        f"\nFall of the probability of {ASKED} continuations ({full:.2f} in full), and how much more it is than that of"
    )
    print(f"others; mean and 95 % interval, {SEEDS} seeds")
    names = "their proponents", "all that state the facts", "random sentences"
    for name, removed, fall, other in zip(names, truth.removed, falls.T, others.T, strict=True):
        print(f"  without {len(removed)} sentences, {name:26s}{interval(fall)}  {interval(fall - other)}")


if __name__ == "__main__":
    main()
