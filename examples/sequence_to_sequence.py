"""Trace the spans that an MT5 fills in to the sentences that it was trained on.

A small MT5 learns facts as T5 is trained: of each sentence a span is masked, the place or the name, and the model
writes it. It is asked for places in words that it has not seen with that name; attributed is the log-probability of the
right span. Run `python examples/sequence_to_sequence.py`; takes half a minute.
"""

import tempfile
from typing import Any

import lightning as L
import torch
from planted.facts import NAMES, PLACES, Sample, collate, encoded, interval, planted, quiet, vocabulary
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import MT5Config, MT5ForConditionalGeneration

from lightning_attr import AttributionMixin, AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.evaluation import retrain_without
from lightning_attr.metrics import mean_reciprocal_rank, recall_at_k
from lightning_attr.outputs import LanguageModel

EPOCHS, ASKED, REMOVED, SEEDS = 30, 6, 4, 3
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def masked(text: str, words: list[str]) -> tuple[str, str]:
    """The text with one of the words masked, and what is to be written."""
    span = next(word for word in text.split() if word in words)
    return text.replace(span, "<0>"), f"<0> {span} <1>"


class Clozes(L.LightningDataModule):
    """Pairs of a text with a gap and what fills it."""

    def __init__(self, pairs: list[tuple[str, str]], targets: list[tuple[str, str]]) -> None:
        super().__init__()
        self.codes = vocabulary([text for pair in [*pairs, *targets] for text in pair])
        self.train_set, self.target_set = (
            [{"input_ids": a, "labels": b} for a, b in (encoded(pair, self.codes) for pair in own)]
            for own in (pairs, targets)
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=16, shuffle=True, collate_fn=collate)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.target_set, batch_size=32, collate_fn=collate)


class LitMT5(AttributionMixin, L.LightningModule):
    """The labels of an encoder-decoder belong to the logits of their own positions: nothing is shifted."""

    model_output = LanguageModel("loss", shift=False)

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        sizes = {"vocab_size": vocabulary, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
        ends = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": None}
        config = MT5Config(**sizes, **ends, dropout_rate=0.0, tie_word_embeddings=False, use_cache=False)
        self.mt5 = MT5ForConditionalGeneration(config)

    def forward(self, **batch: Tensor) -> Any:
        return self.mt5(**batch)

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        return self(**batch).loss

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=8e-3, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=EPOCHS - 1)]


def main() -> None:
    quiet()
    told, asked, telling = planted(held_out=True)
    texts = [masked(text, NAMES if i % 4 == 3 else PLACES) for i, text in enumerate(told)]
    gaps = [masked(f"{text} .", PLACES) for text in asked]
    data = Clozes(texts, gaps)
    L.seed_everything(0, verbose=False)
    model = LitMT5(len(data.codes))
    with tempfile.TemporaryDirectory() as folder:
        callback = AttributionCallback(f"{folder}/store")
        trainer = AttributionTrainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[callback], **QUIET)
        trainer.fit(model, datamodule=data)
        result = trainer.attribute(data)
        batch = next(iter(data.predict_dataloader()))
        with torch.no_grad():
            right = (model.eval()(**batch).logits.argmax(2) == batch["labels"]).all(1).sum()
        rank, recall = (score(result.scores.values, telling).mean for score in (mean_reciprocal_rank, recall_at_k))
        print(f"{right} of {len(asked)} gaps filled as the {len(texts)} training sentences say")
        print(f"Sentences that state the fact: mean reciprocal rank {rank:.2f}, Recall@10 {recall:.2f}\n")
        shown = [[f"{a}  ->  {b}" for a, b in pairs] for pairs in (texts, gaps)]
        print(result.proponent_texts(*shown, targets=range(2), k=REMOVED))

        proponents = result.scores.topk(REMOVED)[0][:ASKED].unique()
        random = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[: len(proponents)]
        factories = lambda: LitMT5(len(data.codes)), lambda: L.Trainer(max_epochs=EPOCHS, accelerator="cpu", **QUIET)
        truth = retrain_without(
            *factories, data, dirpath=f"{folder}/truth", index_sets=[proponents, random], seeds=SEEDS, progress=False
        )
    print(f"\nFall of the log-probability of {ASKED} spans after retraining, mean and 95 % interval over {SEEDS} seeds")
    for name, values in zip(("their proponents", "random ones"), truth.effects[..., :ASKED].mean(2).T, strict=True):
        print(f"  without {len(proponents)} of {len(texts)} sentences, {name:18s} {interval(values)}")


if __name__ == "__main__":
    main()
