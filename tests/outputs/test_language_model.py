"""Outputs of token sequences: their formulas, the identity, what is ignored, what does not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from lightning_attr.outputs import LanguageModel, MulticlassMargin, NegativeLoss
from lightning_attr.outputs.language_model import Kind
from lightning_attr.testing import check_model_output

B, LENGTH, VOCABULARY = 4, 6, 9
PARTS = ("output", "loss", "out_to_loss", "newton_weight")
KINDS: tuple[Kind, ...] = get_args(Kind)


def _logits() -> Tensor:
    return 2 * torch.randn(B, LENGTH, VOCABULARY).double()


def _labels() -> Tensor:
    """Prompts, padding, and a sequence of one labelled token are ignored in part."""
    labels = torch.arange(B * LENGTH).reshape(B, LENGTH) % VOCABULARY
    labels[0, 4:] = -100
    labels[1, :2] = -100
    labels[2, 2:] = -100
    return labels


def _probabilities(logits: Tensor, labels: Tensor, shift: bool, positions: str) -> list[Tensor]:
    """Those of the labelled tokens of each sequence, one token after the other."""
    found = []
    for row in range(B):
        own = [
            logits[row, t - shift].softmax(0)[labels[row, t]]
            for t in range(int(shift), LENGTH)
            if labels[row, t] != -100
        ]
        found.append(torch.stack(own[-1:] if positions == "last" else own))
    return found


def _reference(kind: str, p: Tensor) -> tuple[Tensor, ...]:
    mean = p.log().mean().exp()
    return {
        "loss": (p.log().sum(), -p.log().sum(), torch.ones(()), torch.ones(())),
        "mean_loss": (p.log().mean(), -p.log().mean(), torch.ones(()), torch.ones(())),
        "margin_of_mean": ((mean / (1 - mean)).log(), -mean.log(), 1 - mean, mean * (1 - mean)),
        "sum_of_margins": ((p / (1 - p)).log().sum(), -p.log().sum(), (1 - p).mean(), (p * (1 - p)).mean()),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("shift", [True, False])
def test_values_are_those_of_the_formulas(kind: Kind, positions: Any, shift: bool) -> None:
    logits, labels, output = _logits(), _labels(), LanguageModel(kind, positions, shift)
    expected = zip(*(_reference(kind, p) for p in _probabilities(logits, labels, shift, positions)), strict=True)
    f = output.output(logits, labels)
    values = {"output": f, **output.values(logits, labels, f)}
    for part, rows in zip(PARTS, expected, strict=True):
        torch.testing.assert_close(getattr(output, part)(logits, labels), torch.stack(rows).double())
        torch.testing.assert_close(values[part], torch.stack(rows).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_parts_belong_together(kind: Kind, positions: Any, shift: bool, dtype: torch.dtype) -> None:
    check_model_output(LanguageModel(kind, positions, shift), _logits().to(dtype), _labels(), dtype=None)


def test_only_the_sum_of_several_margins_is_an_approximation() -> None:
    assert {(k, p) for k in KINDS for p in ("all", "last") if not LanguageModel(k, p).exact} == {  # type: ignore[arg-type]
        ("sum_of_margins", "all")
    }

    class Claims(LanguageModel):
        @property
        def exact(self) -> bool:
            return True

    with pytest.raises(AssertionError, match=r"Claims: expected grad loss = -out_to_loss . grad output"):
        check_model_output(Claims("sum_of_margins"), _logits(), _labels())


def test_an_approximate_output_is_still_checked_for_all_else() -> None:
    class Negative(LanguageModel):
        def newton_weight(self, outputs: Any, targets: Tensor) -> Tensor:
            return -super().newton_weight(outputs, targets)

    class Mixing(LanguageModel):
        def output(self, outputs: Any, targets: Tensor) -> Tensor:
            f = super().output(outputs, targets)
            return f + f.mean()

    with pytest.raises(AssertionError, match="Negative: expected `newton_weight` not to be negative"):
        check_model_output(Negative("sum_of_margins"), _logits(), _labels())
    with pytest.raises(AssertionError, match="Mixing: expected each sample's output to depend on its own"):
        check_model_output(Mixing("sum_of_margins"), _logits(), _labels())


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_is_a_classification(kind: Kind) -> None:
    logits, labels = _logits()[:, :2], torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    margin = MulticlassMargin()
    losses = NegativeLoss(lambda s, y: F.cross_entropy(s, y, reduction="none"))
    expected = losses if kind.endswith("loss") else margin
    for part in PARTS:
        found = getattr(LanguageModel(kind), part)(logits, labels)
        torch.testing.assert_close(found, getattr(expected, part)(logits[:, 0], labels[:, 1]))


@pytest.mark.parametrize("kind", ["margin_of_mean", "sum_of_margins"])
@pytest.mark.parametrize("size", [40.0, 1000.0])
def test_fitted_sequences_stay_finite(kind: Kind, size: float) -> None:
    logits = (size * torch.eye(2)[None, :, :]).repeat(2, 1, 1).requires_grad_()
    labels = torch.tensor([[0, 1], [0, 0]])  # both tokens fitted; one wrong
    f = LanguageModel(kind, shift=False).output(logits, labels)
    # The mean of the losses of two tokens of margin m is exp(-m): the margin of the mean is m again.
    expected = [size if kind == "margin_of_mean" else 2 * size, -size / 2 if kind == "margin_of_mean" else 0.0]
    torch.testing.assert_close(f, torch.tensor(expected), rtol=1e-5, atol=1e-4)
    gradient = torch.autograd.grad(f.sum(), logits)[0]
    assert gradient.isfinite().all()
    assert gradient[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_float32(kind: Kind, dtype: torch.dtype) -> None:
    logits = torch.tensor([[[12.0, 0.0, 0.0]] * 2], dtype=dtype)
    for part in PARTS:
        assert getattr(LanguageModel(kind), part)(logits, torch.tensor([[0, 0]])).dtype == torch.float32
    assert LanguageModel(kind).output(logits, torch.tensor([[0, 0]])).item() != 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_logits_of_ignored_tokens_do_not_matter(kind: Kind, positions: Any) -> None:
    logits, labels, output = _logits(), _labels(), LanguageModel(kind, positions, shift=False)
    other = torch.where((labels == -100).unsqueeze(2), 100 * torch.randn_like(logits), logits)
    for part in PARTS:
        assert torch.equal(getattr(output, part)(other, labels), getattr(output, part)(logits, labels))
    renamed = labels.masked_fill(labels == -100, 3)
    assert not torch.equal(output.output(logits, renamed), output.output(logits, labels))
    relabelled = labels.masked_fill(labels == -100, -1)
    other_index = LanguageModel(kind, positions, shift=False, ignore_index=-1)
    assert torch.equal(other_index.output(logits, relabelled), output.output(logits, labels))


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_of_transformers_is_its_logits(kind: Kind) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    logits, labels, output = _logits(), _labels(), LanguageModel(kind)
    whole = transformers.modeling_outputs.CausalLMOutputWithPast(loss=logits.sum(), logits=logits)
    for part in PARTS:
        assert torch.equal(getattr(output, part)(whole, labels), getattr(output, part)(logits, labels))
    check_model_output(output, transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits), labels)


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_under_vmap(kind: Kind) -> None:
    logits, labels, output = _logits(), _labels(), LanguageModel(kind)
    found = vmap(lambda s, y: output.output(s[None], y[None])[0])(logits, labels)
    torch.testing.assert_close(found, output.output(logits, labels))


@pytest.mark.parametrize("shift", [True, False])
def test_the_loss_is_the_likelihood_of_the_distribution(shift: bool) -> None:
    logits, labels, output = _logits(), _labels(), LanguageModel(shift=shift)
    distribution = output.distribution(logits, torch.zeros_like(labels))
    assert distribution.batch_shape == labels.shape
    counted = labels != -100
    counted[:, : int(shift)] = False
    found = -distribution.log_prob(labels.clamp(min=0)).masked_fill(~counted, 0).sum(1)
    torch.testing.assert_close(found, output.loss(logits, labels))


def test_drawn_labels_leave_ignored_tokens_ignored() -> None:
    labels = _labels()
    found = LanguageModel().relabelled(labels, torch.full_like(labels, 7))
    assert torch.equal(found == -100, labels == -100)
    assert (found[labels != -100] == 7).all()


def _edited(row: int, position: int, label: int) -> Tensor:
    labels = _labels()
    labels[row, position] = label
    return labels


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (_logits()[:, 0], _labels(), r"float logits of shape \(b, L, V\), but got torch.float64 of shape \(4, 9\)"),
        (_logits().long(), _labels(), r"logits of shape \(b, L, V\), but got torch.int64 of shape"),
        (SimpleNamespace(loss=1), _labels(), "but got SimpleNamespace. Override `attribution_step`"),
        (_logits(), _labels()[:, 1:], r"labels of shape \(4, 6\), .* but got torch.int64 of shape \(4, 5\). Do not sh"),
        (_logits(), _labels().double(), "but got torch.float64 of shape"),
        (_logits(), _labels() > 0, "but got torch.bool of shape"),
        (_logits(), _labels().tolist(), "but got list"),
        (_logits()[:, :1], _labels()[:, :1], r"at least two tokens .* shape \(4, 1, 9\). Pass `shift=False`"),
        (_logits(), _edited(2, 1, -100), r"at the positions \[2\] of the batch have none: all their labels"),
        (_logits(), _labels() * 0 - 100, r"at the positions \[0, 1, 2, 3\] of the batch"),
        (_logits(), _edited(1, 3, 9), r"labels in \[0, 9\).* position 1 of the batch has the label 9. Resize the"),
        (_logits(), _edited(3, 3, -1), r"position 3 of the batch has the label -1"),
    ],
)
def test_outputs_and_targets_that_do_not_fit(outputs: Any, targets: Any, message: str) -> None:
    for part in PARTS:
        with pytest.raises(ValueError, match=message):
            getattr(LanguageModel("margin_of_mean"), part)(outputs, targets)


def test_arguments_that_are_unknown() -> None:
    with pytest.raises(ValueError, match=r"`kind` of .+ to be 'loss', 'mean_loss', .*, but got 'nll'"):
        LanguageModel("nll")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`positions` of .+ to be 'all' or 'last', but got 'first'"):
        LanguageModel(positions="first")  # type: ignore[arg-type]
