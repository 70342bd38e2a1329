"""The leaderboard's model, its text, and the bank of models that were trained again without some of the text.

A GPT-2 of two layers learns 512 chunks of 32 tokens from scratch, by AdamW in 96 steps. The text is Python's own
reference, which comes with Python; its tokens are learned from it. In a retraining, removed chunks have weight zero in
the batches that they were in: order, number of steps and denominators stay. Each model of the bank is a file.

Learning rate and length were chosen without looking at any score, so that a removal has the effect that its derivative
says: at twice the rate the two do not correlate, and nothing that is linear in the weights can predict a retraining.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_attr import AttributionMixin
from lightning_attr.outputs import LanguageModel

N_TRAIN, N_TUNE, N_REPORT, LENGTH, VOCABULARY = 512, 25, 50, 32, 320
WIDTH, HEADS, LAYERS = 48, 4, 2
EPOCHS, BATCH_SIZE = 12, 64
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON = 1e-3, 0.01, (0.9, 0.999), 1e-6
WARM_UP = 10
STEPS = EPOCHS * N_TRAIN // BATCH_SIZE
FEW = 5
"""Chunks in a removal of 1 %."""


class Text(NamedTuple):
    """Chunks of tokens, each ``(n, LENGTH)``, int64, and the words behind them."""

    train: Tensor
    tune: Tensor
    report: Tensor
    tokenizer: Any

    def words(self, chunks: Tensor) -> list[str]:
        return [self.tokenizer.decode(chunk.tolist()) for chunk in chunks]


@lru_cache(maxsize=1)
def load() -> Text:
    """Cut the text into chunks, and draw those to train on and the queries among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = "\n".join(topics[name] for name in sorted(topics))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokens = torch.tensor(tokenizer.encode(text).ids)
    chunks = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(0))
    train, tune, report, _ = order.split([N_TRAIN, N_TUNE, N_REPORT, len(chunks) - N_TRAIN - N_TUNE - N_REPORT])
    return Text(*(chunks[rows] for rows in (train, tune, report)), tokenizer)


def network(seed: int) -> Any:
    """GPT-2 without dropout, with new weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config)


def rate(step: int) -> float:
    """Share of the learning rate at a step: it rises from a tenth over the first ones, then falls to nothing."""
    return 0.1 + 0.9 * step / WARM_UP if step < WARM_UP else 1 - (step - WARM_UP) / (STEPS - WARM_UP)


def optimizer_of(module: torch.nn.Module) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    optimizer = torch.optim.AdamW(
        module.parameters(), LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean loss of each chunk over its tokens but the first: logits (b, LENGTH, vocabulary) -> (b,)."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


class Writer(AttributionMixin, L.LightningModule):
    """The model as its author would train it; what is attributed is the mean log-likelihood of a chunk."""

    model_output = LanguageModel(kind="mean_loss")

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.network = network(seed)

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        (tokens,) = batch
        return self.network(tokens).logits, tokens

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (tokens,) = batch
        return losses(self.network(tokens).logits, tokens).mean()

    def configure_optimizers(self) -> Any:
        optimizer, schedule = optimizer_of(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches(seed: int) -> list[list[int]]:
    """Rows of each batch of a run, in order."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(N_TRAIN, generator=generator) for _ in range(EPOCHS)]
    return [batch.tolist() for epoch in epochs for batch in epoch.split(BATCH_SIZE)]


class InOrder(torch.utils.data.Sampler[int]):
    """Gives the rows of a run, one epoch after another; the Trainer says which."""

    def __init__(self, seed: int) -> None:
        self.epochs, self.epoch = torch.tensor(batches(seed)).view(EPOCHS, N_TRAIN).tolist(), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return N_TRAIN

    def __iter__(self) -> Iterator[int]:
        return iter(self.epochs[self.epoch])


class TextData(L.LightningDataModule):
    """The chunks, and queries as targets."""

    def __init__(self, seed: int, queries: Tensor) -> None:
        super().__init__()
        self.seed, self.queries = seed, queries

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(load().train), BATCH_SIZE, sampler=InOrder(self.seed))

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.queries), BATCH_SIZE)


# The bank -------------------------------------------------------------------------------------------------------------


def trained(kept: Tensor, seed: int) -> Any:
    """Train again in a plain loop: kept (N_TRAIN,), the weights of the chunks; the seed fixes weights and order."""
    chunks, model = load().train, network(seed)
    optimizer, schedule = optimizer_of(model)
    for rows in batches(seed):
        optimizer.zero_grad()
        (kept[rows] * losses(model(chunks[rows]).logits, chunks[rows])).mean().backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def likelihoods(model: Any) -> Tensor:
    """Mean log-likelihood of each query, (N_TUNE + N_REPORT,)."""
    text = load()
    queries = torch.cat([text.tune, text.report])
    return -losses(model(queries).logits, queries)


def random_removals(count: int, removed: int, seed: int) -> Tensor:
    """Random subsets, (count, N_TRAIN), bool: what stays."""
    ranks = np.random.default_rng(seed).random((count, N_TRAIN)).argsort(1).argsort(1)
    return torch.from_numpy(ranks >= removed)


def _train_one(job: tuple[str, list[bool], int]) -> None:
    """Train one model of the bank, in a process of its own; a killed one leaves no half of a file."""
    torch.set_num_threads(1)
    path, kept, seed = job
    unfinished = f"{path}.{os.getpid()}"
    save_file({"outputs": likelihoods(trained(torch.tensor(kept).float(), seed))}, unfinished)
    Path(unfinished).rename(path)


class Bank:
    """Outputs of models trained on subsets; each is trained once, and kept in a folder.

    Args:
        folder: of the models' outputs.
    """

    train_one = staticmethod(_train_one)

    def __init__(self, folder: Path) -> None:
        recipe = (N_TRAIN, LENGTH, WIDTH, HEADS, LAYERS, EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, BETAS)
        numbers = repr((*recipe, EPSILON, WARM_UP, torch.__version__)).encode()
        known = hashlib.sha256(numbers + torch.cat(load()[:3]).numpy().tobytes())
        self.folder = folder / f"leaderboard-{known.hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def outputs(self, kept: Tensor, seed: int) -> Tensor:
        """Outputs of the queries: kept (m, N_TRAIN) -> (m, N_TUNE + N_REPORT)."""
        paths = [self._path(subset, seed) for subset in kept]
        missing = {path: subset for path, subset in zip(paths, kept, strict=True) if not path.exists()}
        if missing:
            jobs = [(str(path), subset.tolist(), seed) for path, subset in missing.items()]
            with get_context("spawn").Pool(os.cpu_count()) as pool:
                list(tqdm(pool.imap_unordered(self.train_one, jobs), "retraining", len(jobs)))
        return torch.stack([load_file(path)["outputs"] for path in paths])

    def _path(self, kept: Tensor, seed: int) -> Path:
        name = hashlib.sha256(kept.numpy().tobytes()).hexdigest()[:16]
        return self.folder / f"{seed}-{name}.safetensors"


def without(rows: Sequence[int]) -> Tensor:
    """All chunks but these, (N_TRAIN,), bool."""
    kept = torch.ones(N_TRAIN, dtype=torch.bool)
    kept[list(rows)] = False
    return kept
