"""Sequences of tokens: next-token language models, encoder-decoders, fillers of masks."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, Distribution

from lightning_attr.arguments.checks import check_choice, check_flag, check_int
from lightning_attr.errors import InvalidLabelError
from lightning_attr.outputs.base import ModelOutput, at_least_float32, bad_labels, describe
from lightning_attr.outputs.directions import SampleDraws, along, softmax_direction

Kind: TypeAlias = Literal["loss", "mean_loss", "margin_of_mean", "sum_of_margins"]


class LanguageModel(ModelOutput):
    r"""One value for all labelled tokens of a sequence; token :math:`t` has the probability :math:`p_t`.

    ==================  =======================================================  =======================  ==========
    ``kind``            output :math:`f`                                         loss :math:`\ell`        :math:`q`
    ==================  =======================================================  =======================  ==========
    "loss"              :math:`\sum_t \log p_t`                                  :math:`-f`               1
    "mean_loss"         the same over the number of tokens                       :math:`-f`               1
    "margin_of_mean"    :math:`\log\frac{\bar p}{1 - \bar p}`,                   :math:`-\log \bar p`     :math:`1 -
                        :math:`\log\bar p = \frac1T \sum_t \log p_t`                                      \bar p`
    "sum_of_margins"    :math:`\sum_t \log\frac{p_t}{1 - p_t}`                   :math:`-\sum_t \log      mean of
                                                                                 p_t`                     :math:`1 -
                                                                                                          p_t`
    ==================  =======================================================  =======================  ==========

    "margin_of_mean" is what Deng et al. (2024, dattri) attribute of a language model; "sum_of_margins" is what Park et
    al. (2023, TRAK) attribute of a generated text. The first three satisfy :math:`\nabla\ell = -q \nabla f`; with
    several tokens a sequence the last one only approximates it (see ``exact``). All of them are the margin of a
    classifier, or its loss, where a sequence has one labelled token.

    Args:
        kind: what is attributed; use "mean_loss" or "margin_of_mean" if the loss is a mean over a sample's tokens.
        positions: "all" labelled tokens of a sequence, or only the "last".
        shift: True for causal models, of which the logits at position ``t`` predict the label at ``t + 1`` (labels as
            the collators of transformers give them: a copy of the inputs); False for encoder-decoders, models of masked
            tokens, and labels that are shifted already.
        ignore_index: label of tokens without a loss: padding, prompts.

    Raises:
        ValueError: if ``kind`` or ``positions`` is unknown; on use, if logits and labels do not fit.

    Example:
        >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
        >>> LanguageModel("sum_of_margins").output(logits, torch.tensor([[0, 0, 1]]))    # 3 - 0, then 1 - 0
        tensor([4.])
        >>> LanguageModel("sum_of_margins").output(logits, torch.tensor([[0, 0, -100]]))
        tensor([3.])
        >>> LanguageModel().output(logits, torch.tensor([[0, 0, 1]]))
        tensor([-0.3618])
    """

    def __init__(
        self,
        kind: Kind = "loss",
        positions: Literal["all", "last"] = "all",
        shift: bool = True,
        ignore_index: int = -100,
    ) -> None:
        check_choice(self, "kind", kind, get_args(Kind))
        check_choice(self, "positions", positions, ("all", "last"))
        self.kind = kind
        self.positions = positions
        self.shift = check_flag(self, "shift", shift)
        self.ignore_index = check_int(self, "ignore_index", ignore_index)

    @property
    def exact(self) -> bool:
        """False for the sum of several margins, whose one ``q`` stands for those of all tokens."""
        return self.kind != "sum_of_margins" or self.positions == "last"

    def output(self, outputs: Any, targets: Tensor) -> Tensor:
        """Value of each sequence, by the table above.

        Args:
            outputs: logits, float, ``(b, L, V)``, or an output of transformers that holds them as ``logits``.
            targets: labels, integer, ``(b, L)``, in ``[0, V)`` or ``ignore_index``.

        Returns:
            ``f``, float32 or wider, ``(b,)``.

        Raises:
            InvalidLabelError: if a label is outside the vocabulary, or a sequence has no labelled token.
            ValueError: if shapes or dtypes do not fit.
        """
        values, labelled = self._tokens(outputs, targets)
        if self.kind == "margin_of_mean":
            return _log_odds_of_mean(values, labelled)
        total = values.masked_fill(~labelled, 0).sum(1)
        return total / labelled.sum(1) if self.kind == "mean_loss" else total

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Sum of the tokens' cross-entropies in nats, or their mean by the table, ``(b,)``; arguments as above."""
        return self._derived(outputs, targets)[0]

    def out_to_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Probability that is missing, one for a loss, ``(b,)``; arguments as in :meth:`output`."""
        return self._derived(outputs, targets)[1]

    def newton_weight(self, outputs: Any, targets: Tensor) -> Tensor:
        r"""``(b,)``: :math:`\bar p (1 - \bar p)`, the mean of :math:`p_t (1 - p_t)`, or one; arguments as above."""
        return self._derived(outputs, targets)[2]

    def values(self, outputs: Any, targets: Tensor, output: Tensor) -> dict[str, Tensor]:
        """All of them with as few passes over the logits as can be; arguments as in the base class."""
        if any(getattr(type(self), name) is not getattr(LanguageModel, name) for name in _DERIVED):
            return super().values(outputs, targets, output)
        return dict(zip(_DERIVED, self._derived(outputs, targets, output), strict=True))

    def distribution(self, outputs: Any, targets: Tensor) -> Distribution:
        """The softmax at each label, ``(b, L)``; float32 or wider, as vocabularies are large; arguments as above."""
        logits, _ = _checked(outputs, targets, self.shift)
        logits = at_least_float32(logits)
        if self.shift:  # the first label is predicted from nothing
            logits = torch.cat([torch.zeros_like(logits[:, :1]), logits[:, :-1]], 1)
        return Categorical(logits=logits)

    def relabelled(self, targets: Tensor, drawn: Tensor) -> Tensor:
        """Drawn labels where there are observed ones, ``(b, L)``; arguments as in the base class."""
        return drawn.where(targets != self.ignore_index, targets)

    def second_direction(self, outputs: Any, targets: Tensor, draws: SampleDraws) -> Tensor:
        r"""Draw :math:`\sum_t v_t \cdot s_t` with :math:`E[v_t v_t^\top] = \operatorname{diag} p_t - p_t p_t^\top`.

        The directions of the labelled tokens are independent, so that :math:`E[g g^\top]` is the sum of the tokens'
        Gauss-Newton matrices; for the mean of their losses it is over the number of tokens.

        Args:
            outputs: as in :meth:`output`.
            targets: as in :meth:`output`.
            draws: signs or labels of each sample.

        Returns:
            ``(b,)``.
        """
        logits, labels = self._places(outputs, targets)
        labelled = labels != self.ignore_index
        logits = at_least_float32(logits)
        directions = softmax_direction(logits, draws) * labelled[..., None]
        if self.kind in {"mean_loss", "margin_of_mean"}:
            directions = directions / labelled.sum(1).sqrt()[:, None, None]
        return along(logits, directions)

    def _derived(self, outputs: Any, targets: Tensor, output: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, ``q`` and Newton weight; from the output alone, unless it is a sum of margins."""
        if self.kind == "sum_of_margins":
            margins, labelled = self._tokens(outputs, targets)
            missing, count = torch.sigmoid(-margins), labelled.sum(1)
            loss, q, weight = (
                part.masked_fill(~labelled, 0).sum(1)
                for part in (-F.logsigmoid(margins), missing, missing * (1 - missing))
            )
            return loss, q / count, weight / count
        f = self.output(outputs, targets) if output is None else output
        if self.kind == "margin_of_mean":
            missing = torch.sigmoid(-f)
            return -F.logsigmoid(f), missing, missing * (1 - missing)
        return -f, torch.ones_like(f), torch.ones_like(f)

    def _tokens(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability or margin of each token, ``(b, s)``, and which of them are labelled."""
        logits, labels = self._places(outputs, targets)
        labelled = labels != self.ignore_index
        logits = at_least_float32(logits)
        index = labels.masked_fill(~labelled, 0).long().clamp(0, logits.shape[2] - 1).unsqueeze(2)
        if self.kind.endswith("loss"):
            return logits.log_softmax(2).gather(2, index).squeeze(2), labelled
        right = logits.gather(2, index).squeeze(2)
        return right - logits.scatter(2, index, float("-inf")).logsumexp(2), labelled

    def _places(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(b, s, V)`` and labels ``(b, s)`` of the positions that count."""
        logits, labels = _checked(outputs, targets, self.shift)
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        labelled = labels != self.ignore_index
        _check_labels(labels, labelled, logits.shape[2])
        if self.positions == "last":
            place = torch.arange(1, labels.shape[1] + 1, device=labels.device)
            last = (labelled * place).argmax(1, keepdim=True)
            logits = logits.gather(1, last.unsqueeze(2).expand(-1, -1, logits.shape[2]))
            labels = labels.gather(1, last)
        return logits, labels


_DERIVED = ("loss", "out_to_loss", "newton_weight")


def _log_odds_of_mean(margins: Tensor, labelled: Tensor) -> Tensor:
    """Log-odds of the geometric mean of probabilities, from the log-odds of each."""
    # The losses of fitted sequences are below the smallest float, so that their logarithms are what is computed.
    small = math.log(torch.finfo(margins.dtype).eps)
    tiny = margins > -small  # there the loss is exp(-margin)
    losses = -F.logsigmoid(margins.masked_fill(tiny, 0))
    log_losses = torch.where(tiny, -margins, losses.log()).masked_fill(~labelled, float("-inf"))
    log_mean = log_losses.logsumexp(1) - labelled.sum(1).log()
    tiny = log_mean < small
    mean = log_mean.masked_fill(tiny, 0).exp()
    return torch.where(tiny, -log_mean, -mean - (-torch.expm1(-mean)).log())


def _checked(outputs: Any, targets: Any, shift: bool) -> tuple[Tensor, Tensor]:
    """The logits and labels, if their shapes fit."""
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.dtype.is_floating_point:
        found = describe(logits)
        raise ValueError(
            f"Expected the outputs for LanguageModel to be float logits of shape (b, L, V), but got {found}. Override "
            "`attribution_step` to return them; for one label a sample use MulticlassMargin."
        )
    integral = isinstance(targets, Tensor) and not (targets.dtype.is_floating_point or targets.dtype == torch.bool)
    if not integral or targets.shape != logits.shape[:2]:
        raise ValueError(
            f"Expected the targets for LanguageModel to be integer labels of shape {tuple(logits.shape[:2])}, one for "
            f"each position of the logits, but got {describe(targets)}. Do not shift labels or cut the logits "
            "yourself: `shift=True` does, once."
        )
    if shift and logits.shape[1] < 2:
        raise ValueError(
            f"Expected sequences of at least two tokens for LanguageModel, of which the second is predicted, but got "
            f"logits of shape {tuple(logits.shape)}. Pass `shift=False` if they predict the labels of their own "
            "positions."
        )
    return logits, targets


def _check_labels(labels: Tensor, labelled: Tensor, vocabulary: int) -> None:
    empty, outside = bad_labels(labels, labelled, vocabulary)
    if empty:
        raise InvalidLabelError(
            f"Expected each sequence to have at least one labelled token, but those at the positions "
            f"{empty} of the batch have none: all their labels are the ignored one. Look "
            "for texts that were cut before their answer begins, and remove such samples from the data set.",
            empty,
            len(labels),
        )
    if outside:
        sample, place = outside[0]
        raise InvalidLabelError(
            f"Expected labels in [0, {vocabulary}), the vocabulary of the logits, or ignored labels, but the sequence "
            f"at position {sample} of the batch has the label {int(labels[sample, place])}. Resize the model's "
            "embeddings to the tokenizer (`model.resize_token_embeddings(len(tokenizer))`), or set `ignore_index`.",
            [sample],
            len(labels),
        )
