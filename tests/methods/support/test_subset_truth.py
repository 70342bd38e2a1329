from __future__ import annotations

from typing import Any

import pytest
import torch
from truths import truth_of

from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.methods.support.subset_truth import check_subset_truth, mask_digests


def test_truth_that_fits() -> None:
    check_subset_truth("TRAK", truth_of(torch.ones(6, 3)))
    check_subset_truth("TRAK", truth_of(torch.ones(6, 3)), 6, 3)


@pytest.mark.parametrize(
    ("truth", "sizes", "error", "message"),
    [
        ({"kind": "loo"}, (), ValueError, r'random subsets \(kind "lds"\), but its kind is "loo"'),
        ({"subsets": 19}, (), ValueError, "at least 20 subsets, but it has 19"),
        ({}, (7, 3), StoreMismatchError, "it has 6 training samples, and here are 7"),
        ({}, (6, 4), StoreMismatchError, "it has 3 targets, and here are 4"),
    ],
)
def test_truth_that_does_not_fit(truth: dict[str, Any], sizes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_subset_truth("TRAK", truth_of(torch.ones(6, 3), **truth), *sizes)


def test_unfinished_truth() -> None:
    truth = truth_of(torch.ones(6, 3))
    truth.outputs[0, 4] = torch.nan
    with pytest.raises(AttributionError, match="to be finished, but some of its retrainings have no outputs"):
        check_subset_truth("TRAK", truth)


def test_digests_are_of_each_mask() -> None:
    masks = truth_of(torch.ones(30, 3)).masks
    assert len(set(mask_digests(masks))) == len(masks)
    assert mask_digests(masks[[2, 0]]) == [mask_digests(masks)[2], mask_digests(masks)[0]]
    assert mask_digests(masks.int()) == mask_digests(masks)
