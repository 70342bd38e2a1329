"""Sequences taken apart: a data set with one row for each token that a language model is trained to predict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_attr.arguments.checks import check_flag, check_int
from lightning_attr.arguments.messages import argument_message


class LossTokens(Dataset[dict[str, Any]]):
    """The tokens with a loss of another data set, in its order: each row is the whole sequence with one label left.

    Given as training data or as targets, tokens instead of sequences are attributed, by whatever method. With
    ``LanguageModel("loss")`` the rows of a sequence add up to its own row: so do their features, and for methods that
    are linear in a side, their scores.

    Args:
        dataset: map-style; its samples are dicts with one label per token under ``labels``, a list or tensor. They are
            read once here.
        shift: as in :class:`lightning_attr.outputs.LanguageModel`; the first label of a causal model has no loss.
        ignore_index: label of tokens without a loss.
        decoder_start: for encoder-decoders, their ``config.decoder_start_token_id``. They make the decoder's inputs of
            the labels, which must not be of one token: with it, samples without ``decoder_input_ids`` get those of all
            their labels. The collator has to pad them.

    Attributes:
        places: row of ``dataset`` and position in it for each token, int64, ``(len(self), 2)``.

    Raises:
        TypeError: if a sample is no dict with one label per token.
        ValueError: if no token has a loss.

    Example:
        >>> texts = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
        >>> tokens = LossTokens(texts)
        >>> tokens.places.tolist()
        [[0, 1], [0, 2], [1, 1]]
        >>> tokens[1]
        {'input_ids': [5, 6, 7], 'labels': [-100, -100, 7]}
        >>> tokens.sum_by_sample(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 3.])
    """

    def __init__(
        self, dataset: Any, shift: bool = True, ignore_index: int = -100, decoder_start: int | None = None
    ) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(argument_message(self, "dataset", "a map-style data set", dataset))
        shift = check_flag(self, "shift", shift)
        self.dataset = dataset
        self.ignore_index = check_int(self, "ignore_index", ignore_index)
        self.decoder_start = None if decoder_start is None else check_int(self, "decoder_start", decoder_start)
        places = [
            (row, position)
            for row in range(len(dataset))
            for position, label in enumerate(_labels(dataset[row], row))
            if label != ignore_index and not (shift and position == 0)
        ]
        if not places:
            raise ValueError(
                f"Expected the data set to hold tokens with a loss, but all labels of its {len(dataset)} samples are "
                f"ignored ({ignore_index})."
            )
        self.places = torch.tensor(places)

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Give the sequence of a token, with its label alone."""
        row, position = self.places[index].tolist()
        sample = self.dataset[row]
        given = sample["labels"]
        whole = _labels(sample, row)
        labels = [self.ignore_index] * len(whole)
        labels[position] = whole[position]
        found = {"labels": labels}
        if self.decoder_start is not None and "decoder_input_ids" not in sample:
            before = [self.decoder_start if label == self.ignore_index else label for label in whole[:-1]]
            found["decoder_input_ids"] = [self.decoder_start, *before]
        return {**sample, **{key: given.new_tensor(x) if isinstance(given, Tensor) else x for key, x in found.items()}}

    def sum_by_sample(self, values: Tensor, dim: int = 0) -> Tensor:
        """Add up what belongs to the tokens of one sample.

        Args:
            values: scores or features, with one entry per token along ``dim``.
            dim: the dimension of the tokens.

        Returns:
            The same with one entry per sample of ``dataset``, zero where it has no tokens.

        Raises:
            ValueError: if there is not one entry per token.
        """
        if values.shape[dim] != len(self):
            raise ValueError(
                f"Expected argument `values` to have one entry for each of the {len(self)} tokens along dimension "
                f"{dim}, but got shape {tuple(values.shape)}."
            )
        shape = list(values.shape)
        shape[dim] = len(self.dataset)
        return values.new_zeros(shape).index_add(dim, self.places[:, 0].to(values.device), values)


def _labels(sample: Any, row: int) -> list[int]:
    labels = sample.get("labels") if isinstance(sample, Mapping) else None
    if isinstance(labels, Tensor) and labels.ndim == 1:
        return [int(label) for label in labels.tolist()]
    if isinstance(labels, (list, tuple)):
        return [int(label) for label in labels]
    raise TypeError(
        f"Expected sample {row} of the data set to be a dict with one label a token under `labels`, but got "
        f"{type(sample).__name__ if labels is None else type(labels).__name__}. Where a collator makes them, copy "
        "`input_ids` to `labels` in the data set, and take a collator that pads both, such as DataCollatorForSeq2Seq."
    )
