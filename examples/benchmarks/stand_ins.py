"""Small data of the right shapes that ship with scikit-learn or Python, for runs without the real data."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pydoc_data.topics import topics

import torch
from data import Pair
from images import keep_classes
from midi import Note, first_blocks, to_events
from sklearn.datasets import load_digits
from texts import VOCABULARY, split
from torch.nn.functional import interpolate
from torch.utils.data import TensorDataset

SCALE = (0, 2, 4, 5, 7, 9, 11)  # half tones above the key note


def digits(channels: int, size: int, classes: Sequence[int] | None = None) -> Pair:
    """scikit-learn's digits, 1,437 and 360 of them, enlarged: uint8 ``(n, channels, size, size)``."""
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x = interpolate(pixels.view(-1, 1, 8, 8), size=size, mode="bilinear") * (255 / 16)
    x = x.round().to(torch.uint8).expand(-1, channels, -1, -1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order.split([1437, 360])
    return tuple(keep_classes(TensorDataset(x[rows], labels.long()[rows]), classes) for rows in (train, test))


def documentation(length: int) -> Pair:
    """Blocks of characters of Python's own documentation; the rarest characters become spaces."""
    text = "\n".join(topics[name] for name in sorted(topics))
    frequent = {character for character, _ in Counter(text).most_common(VOCABULARY - 1)} | {" "}
    return split("".join(character if character in frequent else " " for character in text), length)


def melodies(n_train: int, n_targets: int, length: int) -> Pair:
    """Blocks of events of random tunes: each in a key, with steps and tempo of its own."""
    return tuple(
        first_blocks((to_events(tune(seed)) for seed in seeds), n, length)
        for seeds, n in ((range(0, 10**6, 2), n_train), (range(1, 10**6, 2), n_targets))
    )


def tune(seed: int, notes: int = 60) -> Iterator[Note]:
    """A random walk on a major scale, over long low notes."""
    chance = random.Random(seed)
    key, beat, degree, time = chance.randrange(36, 48), chance.choice((0.25, 0.4, 0.5)), 14, 0.0
    for k in range(notes):
        degree = min(28, max(7, degree + chance.choice((-2, -1, -1, 0, 1, 1, 2))))
        pitch = key + 12 * (degree // 7) + SCALE[degree % 7]
        duration = beat * chance.choice((0.5, 1, 1, 2))
        yield Note(time, time + 0.9 * duration, pitch, chance.randrange(48, 100))
        if k % 8 == 0:
            yield Note(time, time + 4 * beat, key, 60)
        time += duration
