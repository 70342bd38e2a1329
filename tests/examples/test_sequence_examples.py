"""The data of the examples of music and of generated text, and what is attributed of their models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import generated_text
import music
from midi import NOTE_ON, PAD
from planted.facts import collate, vocabulary
from stand_ins import SCALE

from cases import quiet_trainer
from lightning_attr.batches.nested import select_rows
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.gradients import loop_gradients
from lightning_attr.methods import GradDot
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector

TEXTS = ["a b c d e .", "b a .", "c a b , d a .", "d e d e a c b a .", "e c b ."]  # of several lengths
WRITTEN = ["a b c a .", "b a d e e d ."]
CODES = vocabulary(TEXTS)


def music_case() -> tuple[Any, Any]:
    return music.model(), music.pieces(1, "test")[0][:5]


def text_case() -> tuple[Any, Any]:
    return generated_text.LitNanoGPT(len(CODES)), collate(generated_text.Passages(TEXTS, WRITTEN, CODES).train_set)


def case(name: str) -> tuple[Any, Any]:
    """In float64, with no weight at a special value, and a batch of five samples."""
    module, batch = {"music": music_case, "text": text_case}[name]()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double().eval(), batch


def features(module: Any, batch: Any, b: int) -> dict[str, Tensor]:
    chosen = plan(module, select_rows(batch, b, range(min(b, 4))), min(b, 4))
    assert not chosen.fallback
    return Featurizer(module, chosen, IdentityProjector().bind(ParameterLayout.of(module), "final"))(batch, range(b))


def loop(module: Any, batch: Any, value: Any) -> Tensor:
    """Gradients of a value of ``(module, batch)``, one sample at a time."""
    rows = []
    for i in range(5):
        (total,) = value(module, select_rows(batch, 5, [i]))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, list(module.parameters()))]))
    return torch.stack(rows)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


def output(module: Any, batch: Any) -> Tensor:
    return module.model_output.output(*module.attribution_step(batch))


@pytest.mark.parametrize("name", ["music", "text"])
def test_the_gradient_of_the_loss_is_minus_q_times_that_of_the_output(name: str) -> None:
    module, batch = case(name)
    loss = loop(module, batch, lambda m, one: m.model_output.loss(*m.attribution_step(one)))
    q = module.model_output.out_to_loss(*module.attribution_step(batch)).detach()
    assert_equal(-q[:, None] * loop(module, batch, output), loss)


@pytest.mark.parametrize("name", ["music", "text"])
def test_hooks_give_what_the_loop_gives(name: str) -> None:
    module, batch = case(name)
    found = features(module, batch, 5)["features"]
    assert_equal(found, loop(module, batch, output))
    named = dict(module.named_parameters())
    rows = loop_gradients(lambda p, one: module.functional_output(p, {}, one), named, batch, 5)
    assert_equal(found, torch.cat([rows[key].flatten(1) for key in named], 1))


@pytest.mark.parametrize("name", ["music", "text"])
def test_features_do_not_depend_on_the_batch(name: str) -> None:
    """Texts are padded in the batch of all, and not where they are alone."""
    module, batch = case(name)
    whole = features(module, batch, 5)["features"]
    for i in range(5):
        alone = select_rows(batch, 5, [i])
        if name == "text":
            (length,) = alone["attention_mask"].sum(1).tolist()
            alone = {key: value[:, :length] for key, value in alone.items()}
            assert length == len(TEXTS[i].split())
        assert_equal(features(module, alone, 1)["features"][0], whole[i])
    for part in ([0, 1, 2], [3, 4]):
        assert_equal(features(module, select_rows(batch, 5, part), len(part))["features"], whole[part])


def test_pieces_end_with_their_theme_and_are_all_of_one_length() -> None:
    dataset, themes = music.pieces(3, "test")
    events, following = dataset.tensors
    assert events.shape == following.shape == (3 * music.THEMES, music.LENGTH)
    assert torch.equal(events[:, 1:], following[:, :-1])
    assert events.max() < PAD
    for row, number in zip(following, themes.tolist(), strict=True):
        struck = [int(event) for event in row if event < NOTE_ON + 128]
        assert struck[-8:] == [48 + 12 * (d // 7 - 1) + SCALE[d % 7] for d in music.theme(number)]
        assert struck[-1] == row[-1]
    assert music.names(torch.tensor([300, 60, 188, 61, 48])) == "C4 C#4 C3"


def test_new_pieces_are_none_of_the_training_pieces() -> None:
    data = music.Melodies()
    train, new = ({tuple(row) for row in part.tensors[1].tolist()} for part in (data.train_set, data.target_set))
    assert len(train) == music.THEMES * music.PIECES
    assert not train & new


def test_passages_are_whole_sentences_of_words_that_others_have() -> None:
    texts = generated_text.documentation()
    assert len(texts) > 200
    assert len(texts) == len(set(texts))
    assert all(5 <= len(text.split()) <= generated_text.LONGEST and text.endswith(" .") for text in texts)
    assert "return the hyperbolic tangent of x ." in texts


def test_what_follows_the_prompt_is_measured() -> None:
    module, _ = case("text")
    targets = generated_text.Passages(TEXTS, WRITTEN, CODES).target_set
    found = output(module, collate(targets))
    for text, value in zip(WRITTEN, found.tolist(), strict=True):
        ids = torch.tensor([[CODES[word] for word in text.split()]])
        likelihoods = [module(ids[:, :k])[0, -1].log_softmax(0)[ids[0, k]].item() for k in range(3, ids.shape[1])]
        assert math.isclose(value, sum(likelihoods), rel_tol=1e-10)


def test_the_model_writes_its_likeliest_words_to_the_end_of_a_sentence() -> None:
    module, _ = case("text")
    text = module.write("a b", CODES).split()
    assert text[:2] == ["a", "b"]
    assert text[-1] == "." or len(text) == generated_text.LONGEST
    assert "." not in text[:-1]
    logits = module(torch.tensor([[CODES[word] for word in text]]))[0]
    assert [list(CODES)[i] for i in logits[1:-1].argmax(1)] == text[2:]


def test_words_share_the_product_of_the_gradients_of_their_texts() -> None:
    torch.set_num_threads(1)
    module, _ = case("text")
    module.float()
    data = generated_text.Passages(TEXTS, WRITTEN, CODES)
    rows = torch.tensor([[3, 0], [2, 4]])
    found = generated_text.by_words(module, data, TEXTS, WRITTEN, (rows, torch.ones(2, 2)))
    products = quiet_trainer().attribute(model=module, datamodule=data, method=GradDot()).scores.values
    for j, (target, proponents) in enumerate(found.blocks):
        assert "".join(target.tokens) == WRITTEN[j]
        assert not any(target.contributions[:3])
        expected = products[rows[j], j].tolist()
        assert sum(target.contributions) == pytest.approx(sum(expected), rel=1e-2)
        for i, proponent, total in zip(rows[j].tolist(), proponents, expected, strict=True):
            assert "".join(proponent.tokens) == TEXTS[i]
            assert proponent.contributions[0] == 0
            assert sum(proponent.contributions) == pytest.approx(total, rel=1e-2)
