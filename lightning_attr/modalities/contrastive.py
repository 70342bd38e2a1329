"""Contrastive models, CLIP for instance: simulated batches from a bank of embeddings of the same snapshot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_attr.objectives.mixin import AttributionMixin
from lightning_attr.outputs import ContrastiveMargin, ModelOutput
from lightning_attr.outputs.base import at_least_float32
from lightning_attr.randomness.draws import Draw, Samples
from lightning_attr.randomness.streams import random_words

_NEGATIVES = 300


@dataclass(frozen=True)
class _Bank:
    """Embeddings of training pairs at a snapshot.

    Args:
        images: ``(m, d)``.
        texts: ``(m, d)``.
        position: training row -> position in the bank.
    """

    images: Tensor
    texts: Tensor
    position: Mapping[int, int]


class ContrastiveMixin(AttributionMixin):
    r"""Gives a ``LightningModule`` that trains on pairs of images and texts its model output, the margin of a pair.

    Training compares the pairs of a batch with each other, so that no pair has a loss of its own. Instead each pair is
    compared with its own simulated batch: ``attribution_negatives`` other training pairs, drawn for it alone and the
    same in whatever batch it comes, with embeddings from a bank that is computed once a snapshot with the snapshot's
    weights and held fixed (Park et al., 2023, TRAK, section 5.1). Ground truth by retraining fills the bank of each
    retrained model with all training pairs, those it was not trained on too: models are compared on the same batches.

    Hold the model as ``model`` — transformers' ``CLIPModel`` with batches of ``pixel_values``, ``input_ids`` and
    ``attention_mask``, or one with ``encode_image``, ``encode_text`` and ``logit_scale``, as open_clip makes them, with
    batches ``(images, tokens)`` — or override :meth:`embed`. What ``target_function`` and :meth:`attribution_step` get
    is a dict with the batch as ``pairs``.

    Attributes:
        attribution_bank_size: how many training pairs the bank holds at most; of more, a random sample, the same at
            every snapshot.
        attribution_negatives: other pairs in a simulated batch; None takes 300, or as many as there are.

    Example:
        >>> import lightning as L, torch
        >>> class TwoTowers(ContrastiveMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.image, self.text = torch.nn.Linear(4, 2), torch.nn.Linear(3, 2)
        ...         self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        ...     def embed(self, batch):
        ...         image, text = self.image(batch[0]), self.text(batch[1])
        ...         normalize = torch.nn.functional.normalize
        ...         return normalize(image), normalize(text), self.logit_scale.exp()
        >>> module, pairs = TwoTowers(), (torch.randn(5, 4), torch.randn(5, 3))
        >>> module.attribution_setup(Samples(5, lambda rows: iter([(rows, pairs)])), "final")
        >>> batch = module.attribution_batch(pairs, Draw(range(5), "final"))
        >>> module.attribution_step(batch)[0].shape    # four others each
        torch.Size([5, 2, 5])
    """

    model_output: ModelOutput = ContrastiveMargin()
    attribution_bank_size: int = 50_000
    attribution_negatives: int | None = None
    _attribution_bank: _Bank | None = None

    def embed(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Embed the images and texts of a batch as training does.

        Args:
            batch: what the data loader yields, on the module's device.

        Returns:
            Embeddings of the images and of the texts, ``(b, d)``, of norm one if training compares such, and the logit
            scale that similarities are multiplied with, ``()`` (its exponential, if that is what the model learns).

        Raises:
            TypeError: if the module holds no model that is known, or the batch does not fit it.
        """
        model: Any = getattr(self, "model", None)
        if isinstance(batch, Mapping) and hasattr(model, "logit_scale"):
            found = model(**{name: value for name, value in batch.items() if name != "return_loss"})
            return found.image_embeds, found.text_embeds, model.logit_scale.exp()
        if hasattr(model, "encode_image") and isinstance(batch, (tuple, list)) and len(batch) == 2:
            image, text = model.encode_image(batch[0]), model.encode_text(batch[1])
            normalize = torch.nn.functional.normalize
            return normalize(image, dim=-1), normalize(text, dim=-1), model.logit_scale.exp()
        raise TypeError(
            f"Expected {type(self).__name__} to hold a CLIPModel of transformers, with dicts as batches, or a model of "
            f"open_clip, with batches (images, tokens), as `self.model`, but got a {type(batch).__name__} for "
            f"{type(model).__name__}. Override `embed(self, batch)` to return image embeddings, text embeddings and "
            "the logit scale."
        )

    def attribution_setup(self, samples: Samples, snapshot: str) -> None:
        """Fill the bank with embeddings of the training pairs.

        Args:
            samples: the training pairs.
            snapshot: key of the snapshot, at whose weights the module is.

        Raises:
            ValueError: if there are too few pairs for the simulated batches, or :meth:`embed` returns other shapes.
        """
        count, size = len(samples), self._positive("attribution_bank_size")
        rows: Sequence[int] = range(count)
        if count > size:
            rows = sorted(random_words(count, "bank of pairs").argsort(kind="stable")[:size].tolist())
        if len(rows) < 2:
            raise ValueError(
                f"Expected at least two training pairs for the bank of {type(self).__name__}, so that each has others "
                f"to be compared with, but got {len(rows)}."
            )
        self._negatives(len(rows))
        images, texts = [], []
        with torch.no_grad():
            for numbers, batch in samples.batches(rows):
                image, text, _ = self._embedded(batch, len(numbers))
                images.append(image)
                texts.append(text)
        position = {row: place for place, row in enumerate(rows)}
        self._attribution_bank = _Bank(torch.cat(images), torch.cat(texts), position)

    def attribution_batch(self, batch: Any, draw: Draw) -> dict[str, Any]:
        """Draw the simulated batch of each pair.

        Args:
            batch: what the data loader yields, on the module's device.
            draw: gives random numbers that are each pair's own.

        Returns:
            The batch as ``pairs``, and ``negatives``, positions in the bank, int64, ``(b, N)``, never the pair's own.

        Raises:
            RuntimeError: if there is no bank.
            ValueError: if it has fewer pairs than the simulated batches.
        """
        bank = self._bank()
        count = len(bank.images)
        # Pairs outside the bank are numbered behind it: all of it is other pairs to them.
        rows = [bank.position.get(row, count + row) for row in draw.rows]
        chosen = replace(draw, rows=rows).others(count, self._negatives(count), stream="negatives")
        return {"pairs": batch, "negatives": chosen}

    def attribution_step(self, batch: Any) -> tuple[Tensor, None]:
        """Compare each pair with its simulated batch.

        Args:
            batch: from :meth:`attribution_batch`.

        Returns:
            Logits, float32 or wider, ``(b, 2, 1 + N)``, as :class:`lightning_attr.outputs.ContrastiveMargin` takes
            them, and no targets.

        Raises:
            RuntimeError: if there is no bank.
            TypeError: if the batch has no simulated batches.
            ValueError: if the embeddings do not fit each other.
        """
        bank = self._bank()
        if not (isinstance(batch, Mapping) and "negatives" in batch):
            raise TypeError(
                f"Expected a batch with simulated batches, as `attribution_batch` of {type(self).__name__} returns, "
                f"but got a {type(batch).__name__} without `negatives`. Methods that differentiate the training loss "
                "on their own batches can not attribute contrastive models; use TRAK or another that featurizes."
            )
        negatives = batch["negatives"]
        image, text, scale = self._embedded(batch["pairs"], len(negatives))
        # Outside autocast: with a logit scale of 100, half precision is wrong by whole units.
        with torch.autocast(image.device.type, enabled=False):
            own = (image * text).sum(1, keepdim=True)
            of_image = torch.einsum("bd,bnd->bn", image, bank.texts[negatives])
            of_text = torch.einsum("bd,bnd->bn", text, bank.images[negatives])
            similarity = torch.stack([torch.cat([own, others], 1) for others in (of_image, of_text)], 1)
            return at_least_float32(scale) * similarity, None

    def _bank(self) -> _Bank:
        if self._attribution_bank is None:
            raise RuntimeError(
                f"Expected {type(self).__name__} to have a bank of embeddings, but it has none: `attribution_setup` "
                "never ran. AttributionCallback and `trainer.attribute` call it; elsewhere call "
                "`module.attribution_setup(samples, snapshot)` first, and again after each change of the weights."
            )
        return self._attribution_bank

    def _embedded(self, batch: Any, count: int) -> tuple[Tensor, Tensor, Tensor]:
        image, text, scale = self.embed(batch)
        name = f"`embed` of {type(self).__name__}"
        if image.ndim != 2 or text.ndim != 2 or not len(image) == len(text) == count:
            raise ValueError(
                f"Expected {name} to return one image embedding and one text embedding for each of {count} pairs, of "
                f"shape ({count}, d), but got {tuple(image.shape)} and {tuple(text.shape)}. Look for a list of "
                "captions that is not as long as the batch, or holds several captions an image."
            )
        if image.shape != text.shape:
            raise ValueError(
                f"Expected {name} to return embeddings of images and texts of the same width, but got "
                f"{image.shape[1]} and {text.shape[1]}. Return them after the projections into the common space."
            )
        if not isinstance(scale, Tensor):
            scale = image.new_tensor(scale)
        if scale.numel() != 1:
            raise ValueError(
                f"Expected {name} to return one logit scale, but got a tensor of shape {tuple(scale.shape)}."
            )
        return at_least_float32(image), at_least_float32(text), scale.reshape(())

    def _negatives(self, count: int) -> int:
        """Size of the simulated batches from a bank of this many pairs."""
        if self.attribution_negatives is None:
            return min(_NEGATIVES, count - 1)
        wanted = self._positive("attribution_negatives")
        if wanted >= count:
            raise ValueError(
                f"Expected more than {wanted} pairs in the bank of {type(self).__name__}, so that each has "
                f"`attribution_negatives` = {wanted} others, but got {count}. Set it to at most {count - 1}, or to "
                "None, which takes as many as there are."
            )
        return wanted

    def _positive(self, name: str) -> int:
        value = getattr(self, name)
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"Expected `{name}` of {type(self).__name__} to be a positive integer, but got {value!r}.")
        return value
