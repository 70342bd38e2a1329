"""Sentences with planted facts, in word tokens, for the examples of language models."""

import logging
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.logging import set_verbosity_error

NAMES = [start + end for start in ("ba", "de", "ki", "lo", "mu", "ri", "so", "ta") for end in ("ran", "nel", "vik")]
PLACES = ["lima", "oslo", "cairo", "quito", "delhi", "turin"]
BORN = [f"{told} {{place}} ." for told in ("{name} was born in", "the birthplace of {name} is", "{name} comes from")]
BORN += ["the parents of {name} lived in {place} .", "it was in {place} that {name} first saw the light ."]
Sample = dict[str, Tensor]


def planted(shift: int = 0, held_out: bool = False) -> tuple[list[str], list[str], list[list[int]]]:
    """Tell each fact in five sentences and ask for it with the beginning of one, which may be held out.

    Returns the sentences, those that ask, which end with the answer, and for each of these which sentences tell it.
    A shift plants other facts.
    """
    told, asked, telling = [], [], []
    for j, name in enumerate(NAMES):
        texts = [text.format(name=name, place=PLACES[(j + shift) % len(PLACES)]) for text in BORN]
        asked.append((texts.pop(j % 4) if held_out else texts[j % 4]).removesuffix(" ."))
        telling.append([*range(len(told), len(told) + len(texts))])
        told += texts
    return told, asked, telling


def documentation(count: int = 60) -> list[str]:
    """Sentences of Python's documentation, in its most frequent words."""
    lines = [" ".join(re.findall(r"[a-z]+", line)) for text in topics.values() for line in text.lower().split(". ")]
    frequent = {word for word, _ in Counter(" ".join(lines).split()).most_common(150)}
    chosen = [line.split()[:14] for line in lines if 6 <= len(line.split()) <= 25][:count]
    return [" ".join(word if word in frequent else "something" for word in words) + " ." for words in chosen]


def vocabulary(texts: Sequence[str]) -> dict[str, int]:
    """Words and their tokens; 0 is padding."""
    return {word: code for code, word in enumerate(["<pad>", *sorted({*" ".join(texts).split()})])}


def encoded(texts: Sequence[str], codes: dict[str, int]) -> list[Tensor]:
    return [torch.tensor([codes[word] for word in text.split()]) for text in texts]


def collate(samples: Sequence[Sample]) -> Sample:
    """Pad, as the collators of transformers do."""
    batch = {key: [sample[key] for sample in samples] for key in ("input_ids", "labels")}
    mask = [torch.ones_like(row) for row in batch["input_ids"]]
    return {
        "input_ids": pad_sequence(batch["input_ids"], batch_first=True),
        "attention_mask": pad_sequence(mask, batch_first=True),
        "labels": pad_sequence(batch["labels"], batch_first=True, padding_value=-100),
    }


def interval(values: Tensor) -> str:
    """Mean and 95 % interval over three seeds, by the t distribution."""
    half = 4.303 * values.std() / 3**0.5
    return f"{values.mean():6.2f} ({values.mean() - half:.2f} to {values.mean() + half:.2f})"


def quiet() -> None:
    torch.set_num_threads(1)  # on matrices as small as these, threads only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning|transformers")
    set_verbosity_error()
