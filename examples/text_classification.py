"""Find mislabelled paragraphs of Python's own documentation with a small BERT; retrain without a topic's proponents.

Run `python examples/text_classification.py`; the feature store goes to `out/text_classification/`. Needs
transformers, downloads nothing, and takes about a minute.
"""

import importlib
import inspect
import logging
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import BertConfig, BertForSequenceClassification

from lightning_attr import AttributionMixin, AttributionTrainer
from lightning_attr.callbacks import AttributionCallback

OUT = Path("out/text_classification")
EPOCHS, SEEDS, LENGTH, VOCABULARY, TRAIN, TEST = 8, (1, 2, 3), 24, 1500, 300, 100  # the last two: paragraphs a topic
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False}
TOPICS = {
    "numbers": "cmath math statistics decimal fractions random numbers operator heapq bisect",
    "network": "http.client http.server http.cookiejar urllib.request urllib.parse socket ssl smtplib ftplib imaplib",
    "files": "os shutil pathlib tarfile zipfile tempfile glob io gzip bz2 lzma posixpath fileinput _pyio",
    "testing": "unittest.case unittest.mock doctest unittest.loader unittest.runner pdb trace logging timeit",
}


class LitBert(AttributionMixin, L.LightningModule):
    """A `forward` that takes the keys of the batch: the mixin needs nothing else."""

    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
        size |= {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "num_labels": len(TOPICS)}
        self.bert = BertForSequenceClassification(BertConfig(pad_token_id=0, **size))

    def forward(self, **batch: Tensor) -> object:
        return self.bert(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch).loss

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=EPOCHS - 1)]


def paragraphs(modules: str) -> list[list[str]]:
    """The words of each paragraph in the docstrings of modules, their classes and functions."""
    found: dict[tuple[str, ...], None] = {}
    for module in map(importlib.import_module, modules.split()):
        own = [o for o in vars(module).values() if getattr(o, "__module__", None) == module.__name__]
        members = [o for cls in own if inspect.isclass(cls) for o in vars(cls).values() if callable(o)]
        for documented in (module, *own, *members):
            text = documented.__doc__ if isinstance(documented.__doc__, str) else ""
            for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
                words = tuple(re.findall(r"[a-z]+", paragraph.lower())[: LENGTH - 1])
                if len(words) >= 8:
                    found[words] = None
    return [list(words) for words in found]


class Paragraphs(L.LightningDataModule):
    """Paragraphs with their topics, a tenth of the training labels flipped to another one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        train, test = [], []
        for label, modules in enumerate(TOPICS.values()):
            texts = [(words, label) for words in paragraphs(modules)]
            order = torch.randperm(len(texts), generator=generator).tolist()
            train += [texts[i] for i in order[:TRAIN]]
            test += [texts[i] for i in order[TRAIN : TRAIN + TEST]]
        common = Counter(word for words, _ in train for word in words).most_common(VOCABULARY - 3)
        ids = {word: i for i, (word, _) in enumerate(common, start=3)}  # 0 pads, 1 opens, 2 is any other word
        self.flipped = torch.zeros(len(train), dtype=torch.bool)
        self.flipped[torch.randperm(len(train), generator=generator)[: len(train) // 10]] = True
        shift = torch.randint(1, len(TOPICS), (len(train),), generator=generator) * self.flipped
        noisy = [(words, (label + int(s)) % len(TOPICS)) for (words, label), s in zip(train, shift, strict=True)]
        self.train_set, self.test_set = (
            [{"input_ids": [1, *(ids.get(word, 2) for word in words)], "labels": label} for words, label in side]
            for side in (noisy, test)
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=32, shuffle=True, collate_fn=pad)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=100, collate_fn=pad)


def pad(samples: list[dict]) -> dict[str, Tensor]:
    ids = [torch.tensor(sample["input_ids"]) for sample in samples]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    labels = torch.tensor([sample["labels"] for sample in samples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def accuracy(model: LitBert, data: Paragraphs) -> float:
    batch = pad(data.test_set)
    with torch.no_grad():
        return (model.eval()(**batch).logits.argmax(1) == batch["labels"]).double().mean().item()


def margin(model: LitBert, data: Paragraphs, rows: list[int]) -> float:
    """Mean log-odds of the right topic: what is attributed."""
    with torch.no_grad():
        return model.eval().functional_output({}, {}, pad([data.test_set[i] for i in rows])).mean().item()


def retrained(data: Paragraphs, keep: Tensor, seed: int) -> LitBert:
    """Train from scratch on some of the paragraphs."""
    L.seed_everything(seed, verbose=False)
    model = LitBert()
    loader = DataLoader(Subset(data.train_set, keep.tolist()), batch_size=32, shuffle=True, collate_fn=pad)
    L.Trainer(max_epochs=EPOCHS, **QUIET).fit(model, loader)
    return model


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    shutil.rmtree(OUT, ignore_errors=True)
    L.seed_everything(0, verbose=False)
    data, model = Paragraphs(), LitBert()
    callback = AttributionCallback(OUT / "attribution", noise_mask=data.flipped)
    trainer = AttributionTrainer(max_epochs=EPOCHS, callbacks=[callback], **QUIET)
    trainer.fit(model, datamodule=data)
    print(f"Test accuracy {accuracy(model, data):.3f} (chance {1 / len(TOPICS):.3f})")

    result = trainer.attribute(data)
    metrics = result.metrics
    for name, key in {"self-influence": "", "training loss": "loss_"}.items():
        auroc, recall = metrics[f"{key}noisy_label_auroc"], metrics[f"{key}noisy_label_recall@10%"]
        print(f"Flipped labels by {name:14s}  AUROC {auroc:.3f}, found in the top 10 % {recall:.3f}")

    topic = [i for i, sample in enumerate(data.test_set) if sample["labels"] == 0]
    n, cut = len(data.train_set), len(data.train_set) // 5
    least = torch.as_tensor(result.scores.values)[:, topic].sum(1).argsort()  # the proponents of the topic come last
    shuffled = [torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    without = torch.tensor([margin(retrained(data, least[:-cut], seed), data, topic) for seed in SEEDS])
    pairs = zip(SEEDS, shuffled, strict=True)
    random = torch.tensor([margin(retrained(data, order[cut:], seed), data, topic) for seed, order in pairs])
    change = without - random
    half = 4.303 * change.std() / len(SEEDS) ** 0.5  # Student's t for three seeds, 95 %
    print(
        f"Log-odds of the topic “{next(iter(TOPICS))}” on its {len(topic)} test paragraphs, mean of retrained models:"
    )
    print(f"  without its {cut} top proponents {without.mean():+.2f}, without {cut} random ones {random.mean():+.2f}")
    print(f"Counterfactual: the proponents carry {-change.mean():.2f} +- {half:.2f} (95 %) more of it than random ones")


if __name__ == "__main__":
    main()
