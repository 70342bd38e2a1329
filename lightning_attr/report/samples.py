"""Which samples a page shows, drawn and within its budget of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from markupsafe import escape

from lightning_attr.report.renderers import Renderer

_LABEL_FIELDS = ("label", "labels", "target", "y")


class Drawings:
    """Samples of one page as HTML, drawn once each until the budget is spent.

    Args:
        renderer: from a sample to HTML.
        budget: bytes that all samples of the page may take.
    """

    def __init__(self, renderer: Renderer, budget: int) -> None:
        self.renderer = renderer
        self.left = budget
        self.without = 0

    def draw(self, dataset: Any, index: int, item: Any) -> str | None:
        """Draw a sample.

        Returns HTML, or None if nothing is left of the budget.
        """
        if self.left <= 0:
            self.without += 1
            return None
        try:
            drawn = str(escape(self.renderer(sample_of(item))))
        except Exception as error:
            raise ValueError(
                f"Sample {index} of {type(dataset).__name__} could not be drawn: {type(error).__name__}: {error} Pass "
                "a `renderer`, a function from a sample to HTML, that can draw it."
            ) from error
        self.left -= len(drawn)
        return drawn

    def draw_all(self, dataset: Any, indices: Iterable[int]) -> dict[int, str]:
        """Draw samples, in this order as far as the budget goes."""
        drawn: dict[int, str] = {}
        for index in dict.fromkeys(indices):
            item = read_item(dataset, index) if self.left > 0 else None
            html = self.draw(dataset, index, item)
            if html is not None:
                drawn[index] = html
        return drawn


def read_item(dataset: Any, index: int) -> Any:
    """Read an item of a data set."""
    try:
        return dataset[index]
    except Exception as error:
        raise ValueError(
            f"Item {index} of {type(dataset).__name__} could not be read: {type(error).__name__}: {error} Pass the "
            "data set that was attributed, or one whose items have the same indices."
        ) from error


def sample_of(item: Any) -> Any:
    """What is to be seen of an item: the first of a tuple, a mapping without its label, else the item."""
    if isinstance(item, tuple) and item:
        return item[0]
    if isinstance(item, Mapping):
        fields = {name: value for name, value in item.items() if name not in _LABEL_FIELDS}
        return next(iter(fields.values())) if len(fields) == 1 else fields
    return item


def label_of(item: Any) -> int | str | None:
    """Read the label of an item: its second entry, or a field of this name, if that is a class or a word.

    Returns the label, or None if there is none that can be written in a word.
    """
    label = item[1] if isinstance(item, tuple) and len(item) > 1 else None
    if isinstance(item, Mapping):
        label = next((item[name] for name in _LABEL_FIELDS if name in item), None)
    if isinstance(label, torch.Tensor) and label.ndim == 0:
        label = label.item()
    if isinstance(label, float):
        return f"{label:.4g}"
    return label if isinstance(label, (int, str)) else None
