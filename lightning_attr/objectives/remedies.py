"""Code to write, in the user's own names: shown where a loss is not made of one term per sample."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any


def mixin_lines(module: Any, batch: Any) -> str:
    """Write the lines of a mixin that says what the loss of a sample is.

    Returns text with code to paste.

    Example:
        >>> import torch
        >>> print(mixin_lines(torch.nn.Linear(1, 1), {"x": 1, "labels": 2}).splitlines()[-2].strip())
        x, labels = batch["x"], batch["labels"]
    """
    name = type(module).__name__
    taken, inputs, targets = _taken_apart(batch)
    return f"""Say with the mixin what the loss of a sample is, in a subclass of {name}, and train that:

    from lightning_attr import AttributionMixin
    from lightning_attr.outputs import NegativeLoss

    class Attributed{name}(AttributionMixin, {name}):
        model_output = NegativeLoss(lambda outputs, targets: ...)  # shape (b,), without reduction over the samples

        def attribution_step(self, batch):  # here {describe_batch(batch)}
            {taken}
            return self({inputs}), {targets}  # outputs, targets"""


def describe_batch(batch: Any) -> str:
    """Say in words what a batch is.

    Returns its type, with its keys or its length.

    Example:
        >>> describe_batch(("x", "y"))
        'a tuple of 2'
    """
    name = type(batch).__name__
    article = "an" if name[0].lower() in "aeiou" else "a"
    if isinstance(batch, Mapping):
        return f"{article} {name} with the keys {', '.join(repr(key) for key in batch)}"
    if isinstance(batch, (list, tuple)):
        return f"{article} {name} of {len(batch)}"
    return f"{article} {name}"


def _taken_apart(batch: Any) -> tuple[str, str, str]:
    """A line that names the parts of a batch, and which of them are inputs and targets, as far as anyone can guess."""
    if isinstance(batch, Mapping) and len(batch) > 1:
        keys = list(batch)
        names = [key if isinstance(key, str) and _usable(key) else f"part{i}" for i, key in enumerate(keys)]
        line = f"{', '.join(names)} = {', '.join(f'batch[{key!r}]' for key in keys)}".replace("'", '"')
        target = next((name for name in names if name in {"y", "labels", "label", "targets", "target"}), names[-1])
        return line, ", ".join(name for name in names if name != target), target
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return "x, y = batch", "x", "y"
    if isinstance(batch, (list, tuple)) and 2 < len(batch) <= 8:
        names = [f"x{i}" for i in range(1, len(batch))]
        return f"{', '.join(names)}, y = batch", ", ".join(names), "y"
    return "x = batch", "x", "batch"


def _usable(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name) and name != "batch"
