"""The bank of the leaderboard without text: what a removal is where images share a batch's statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("sklearn")

import leaderboard_digits
import leaderboard_images
from leaderboard_text import N_TRAIN


def test_images_are_shifted_each_by_its_own_draw() -> None:
    images = torch.rand(5, 1, 8, 8)
    torch.manual_seed(0)
    found = leaderboard_digits.shifted(images)
    torch.manual_seed(0)
    top, left = torch.randint(3, (2, 5, 1)).squeeze(-1).tolist()
    padded = F.pad(images, (1, 1, 1, 1))
    expected = [padded[i, :, top[i] : top[i] + 8, left[i] : left[i] + 8] for i in range(5)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=0)
    assert len({*zip(top, left, strict=True)}) > 1


def test_orders_hold_every_image_once_an_epoch() -> None:
    found = leaderboard_digits.orders(1)
    assert (found.sort(1).values == torch.arange(N_TRAIN)).all()
    assert not torch.equal(found[0], found[1])


def test_a_removed_image_counts_in_the_statistics_but_not_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, x_query, y_query = leaderboard_digits.load()
    kept = torch.ones(N_TRAIN)
    kept[3] = 0
    label, pixels = y.clone(), x.clone()
    label[3] = (y[3] + 1) % 10
    pixels[3] = 1 - x[3]

    def outputs(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(leaderboard_digits, "load", lambda: (images, labels, x_query, y_query))
        return leaderboard_digits.margins(leaderboard_digits.trained(kept, 0))

    as_it_is = outputs(x, y)
    assert torch.equal(outputs(x, label), as_it_is)
    assert not torch.equal(outputs(pixels, y), as_it_is)


def test_the_plain_loop_of_the_bank_is_the_trainers_run(tmp_path: Path) -> None:
    leaderboard_images.record(tmp_path / "run")  # it compares them
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        leaderboard_images.check_same(tmp_path / "run", seed=1)
