"""A character language model on text that ships with Python: data, recipe, and the ground truth by retraining.

One sample is 64 characters of a `pydoc` topic and the character before each of them as context; the model output of a
target is its mean log-likelihood. Held-out sequences are from the same topics as the training sequences, in between.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from digits import CACHE

N_TRAIN, N_TARGET, LENGTH, N_TOPICS = 512, 128, 64, 16
WIDTH, HEADS, DEPTH = 64, 4, 2
EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 15, 16, 2e-3, 0.01
SUBSETS = {"tune": (60, 1), "report": (60, 2)}  # subsets, seeds of each
SUBSET_SEEDS = {"tune": 1, "report": 2}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).movedim(-3, 0).transpose(-2, -3)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(-2, -3).flatten(-2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]  # modules return Any


class CharacterModel(nn.Module):
    """A transformer of two layers."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, characters: Tensor) -> Tensor:
        place = torch.arange(characters.shape[-1], device=characters.device)
        x = self.embedding(characters) + self.position(place)
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]  # modules return Any


def load() -> tuple[Tensor, Tensor, int]:
    """Sequences (N_TRAIN, LENGTH + 1) and (N_TARGET, LENGTH + 1), int64, and the size of the vocabulary."""
    total = N_TRAIN + N_TARGET
    longest = sorted(topics, key=lambda name: (-len(topics[name]), name))[:N_TOPICS]
    pieces = []
    for name in longest:
        text = topics[name]
        pieces += [text[i : i + LENGTH + 1] for i in range(0, len(text) - LENGTH, LENGTH)][: total // N_TOPICS]
    pieces = pieces[:total]
    known = {character: code for code, character in enumerate(sorted(set("".join(pieces))))}
    codes = torch.tensor([[known[character] for character in piece] for piece in pieces])
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return codes[order[:N_TRAIN].sort().values], codes[order[N_TRAIN:].sort().values], len(known)


def log_likelihood(logits: Tensor, sequences: Tensor) -> Tensor:
    """Mean log-likelihood of each sequence: logits (b, LENGTH, vocabulary), sequences (b, LENGTH + 1) -> (b,)."""
    return -F.cross_entropy(logits.transpose(-1, -2), sequences[..., 1:], reduction="none").mean(-1)


def start(vocabulary: int, seed: int) -> CharacterModel:
    torch.manual_seed(seed)
    return CharacterModel(vocabulary)


def adamw(model: nn.Module, steps: int) -> tuple[AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The recipe's optimizer, its learning rate falling linearly to 0 over `steps`."""
    optimizer = AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)


def trained(sequences: Tensor, vocabulary: int, seed: int) -> CharacterModel:
    model = start(vocabulary, seed)
    batches = [batch for _ in range(EPOCHS) for batch in torch.randperm(len(sequences)).split(BATCH_SIZE)]
    optimizer, schedule = adamw(model, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        (-log_likelihood(model(sequences[batch, :-1]), sequences[batch])).mean().backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def ground_truth(subsets: str, cache: Path = CACHE) -> tuple[Tensor, Tensor]:
    """Mean log-likelihoods of the targets after retraining on half subsets; as `digits.ground_truth`.

    Returns:
        The subsets (m, N_TRAIN) bool, and the outputs (seeds, m, N_TARGET) float32.
    """
    (m, runs), seed = SUBSETS[subsets], SUBSET_SEEDS[subsets]
    train, targets, vocabulary = load()
    recipe = (WIDTH, HEADS, DEPTH, EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, m, runs, seed, train, targets)
    numbers = [part.tolist() if isinstance(part, Tensor) else part for part in recipe]
    name = f"text-{subsets}-{hashlib.sha256(repr(numbers).encode()).hexdigest()[:12]}.safetensors"
    if not (cache / name).exists():
        print(f"Training {m * runs} models for {cache / name}", file=sys.stderr, flush=True)
        ranks = np.random.default_rng(seed).random((m, N_TRAIN)).argsort(1).argsort(1)
        masks, outputs = torch.from_numpy(ranks < N_TRAIN // 2), torch.empty(runs, m, N_TARGET)
        for run in range(runs):
            for k, mask in enumerate(masks):
                model_seed = int(np.random.SeedSequence((seed, run, k)).generate_state(1)[0])
                with torch.enable_grad():
                    model = trained(train[mask], vocabulary, model_seed)
                with torch.no_grad():
                    outputs[run, k] = log_likelihood(model(targets[:, :-1]), targets)
        cache.mkdir(parents=True, exist_ok=True)
        save_file({"masks": masks, "outputs": outputs}, cache / name)
    tensors = load_file(cache / name)
    return tensors["masks"], tensors["outputs"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for family in SUBSETS:
        begun = time.perf_counter()
        print(family, *(tuple(part.shape) for part in ground_truth(family)), f"{time.perf_counter() - begun:.0f} s")
