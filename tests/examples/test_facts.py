"""What the examples of language models are made of."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from planted.facts import NAMES, collate, documentation, encoded, interval, planted, vocabulary


@pytest.mark.parametrize(("held_out", "count"), [(False, 5), (True, 4)])
def test_each_fact_is_told_where_the_lists_say(held_out: bool, count: int) -> None:
    told, asked, telling = planted(held_out=held_out)
    assert len(told) == len(set(told)) == count * len(NAMES)
    for name, question, rows in zip(NAMES, asked, telling, strict=True):
        place = question.split()[-1]
        assert name in question
        assert len(rows) == count
        assert all({name, place} <= {*told[row].split()} for row in rows)
        assert (f"{question} ." in told) != held_out


def test_another_shift_plants_other_facts_in_the_same_words() -> None:
    one, other = planted()[0], planted(shift=1)[0]
    assert not {*one} & {*other}
    assert vocabulary(one) == vocabulary(other)


def test_documentation_is_short_sentences() -> None:
    texts = documentation(20)
    assert len(texts) == 20
    assert all(5 < len(text.split()) <= 15 for text in texts)


def test_batches_are_padded_as_transformers_wants_them() -> None:
    rows = encoded(["a b", "b a b"], vocabulary(["a b"]))
    batch = collate([{"input_ids": row, "labels": row} for row in rows])
    assert batch["input_ids"].tolist() == [[1, 2, 0], [2, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[1, 2, -100], [2, 1, 2]]


def test_the_interval_is_that_of_the_t_distribution() -> None:
    from scipy.stats import t

    values = torch.tensor([1.0, 2.0, 4.0])
    low, high = t.interval(0.95, 2, values.mean(), values.std() / 3**0.5)
    assert interval(values) == f"  2.33 ({low:.2f} to {high:.2f})"
