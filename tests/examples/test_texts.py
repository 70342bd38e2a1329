from __future__ import annotations

import random
import string
from pathlib import Path

import pytest
import texts
import torch
from data import MissingDataError

CHARACTERS = (string.ascii_letters + string.digits + "\n .")[: texts.VOCABULARY]


def text_of(length: int) -> str:
    return "".join(random.Random(0).choices(CHARACTERS, k=length))


def test_shakespeare_is_cut_into_the_published_number_of_blocks(tmp_path: Path) -> None:
    text = text_of(1_115_394)  # as long as tiny Shakespeare
    (tmp_path / "input.txt").write_text(text, "utf-8")
    train, targets = texts.shakespeare(tmp_path)
    assert (len(train), len(targets)) == (3921, 435)
    x, y = train.tensors
    assert (x.shape, y.shape, x.dtype) == ((3921, 256), (3921, 256), torch.int64)
    in_order = sorted(CHARACTERS)
    assert "".join(in_order[token] for token in x[:2].flatten()) == text[:512]
    assert "".join(in_order[token] for token in y[1]) == text[257:513]
    assert "".join(in_order[token] for token in targets.tensors[0][0]) == text[1_003_854:][:256]


def test_missing_shakespeare_says_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"no input\.txt there\. Put input\.txt .*tinyshakespeare"):
        texts.shakespeare(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((text_of(5000) + "äöü").encode(), "it has 68 different characters instead of 65"),
        (text_of(2000).encode(), "its 2000 characters are too few for blocks of 256"),
        (b"", "its 0 characters are too few"),
        (b"\xff\xfe" + bytes(9), "'utf-8' codec can't decode"),
    ],
)
def test_another_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "input.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"input\.txt to be tiny Shakespeare, but .*{message}"):
        texts.shakespeare(tmp_path)


def test_blocks_are_tokens_and_the_tokens_that_follow() -> None:
    x, y = texts.blocks(torch.arange(10), 3).tensors
    assert x.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert y.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert len(texts.blocks(torch.arange(9), 3)) == 2  # the last token of a third block has none that follows
