"""Characters of a text, in blocks."""

from __future__ import annotations

from pathlib import Path

import torch
from data import Pair, find
from torch.utils.data import TensorDataset

SHAKESPEARE_ADVICE = (
    "Put input.txt (1.1 MB) there, from "
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt. To try the command "
    "without data: `--stand-in`."
)
VOCABULARY = 65
"""Different characters in tiny Shakespeare."""


def shakespeare(folder: Path) -> Pair:
    """Blocks of the first nine tenths of ``input.txt``, and of the rest: 3,921 and 435 of 256 characters.

    Raises:
        ValueError: if the text is another one.
    """
    path = find(folder, ["input.txt"], SHAKESPEARE_ADVICE)
    try:
        return split(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected {path} to be tiny Shakespeare, but {error}. {SHAKESPEARE_ADVICE}") from None


def split(text: str, length: int = 256) -> Pair:
    """Characters, numbered in their order, cut into blocks; what is left over is dropped.

    Raises:
        ValueError: if there are too many different characters, or too few for a block of each kind.
    """
    characters = sorted(set(text))
    if len(characters) > VOCABULARY:
        raise ValueError(f"it has {len(characters)} different characters instead of {VOCABULARY}")
    numbers = {character: number for number, character in enumerate(characters)}
    tokens = torch.tensor([numbers[character] for character in text], dtype=torch.int64)
    parts = tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]
    if min(len(part) for part in parts) <= length:
        raise ValueError(f"its {len(text)} characters are too few for blocks of {length}")
    train, targets = (blocks(part, length) for part in parts)
    return train, targets


def blocks(tokens: torch.Tensor, length: int) -> TensorDataset:
    """Pairs of ``length`` tokens and, for each of them, the one that follows: ``(n, length)`` both."""
    n = (len(tokens) - 1) // length
    return TensorDataset(tokens[: n * length].view(n, length), tokens[1 : n * length + 1].view(n, length))
