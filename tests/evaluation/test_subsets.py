"""Subsets and seeds."""

from __future__ import annotations

import torch

from lightning_attr.evaluation.subsets import leave_one_out, random_subsets, removals


def test_random_subsets_are_fair_and_do_not_depend_on_their_number() -> None:
    plan = random_subsets(50, num_subsets=2000, alpha=0.3, repeats=1, seed=3)
    assert plan.masks.dtype == torch.bool
    assert (plan.masks.sum(1) == 15).all()
    # Each sample is in 0.3 of 2000 subsets: standard deviation 20.5.
    assert ((plan.masks.sum(0) - 600).abs() < 100).all()
    # Pairs: 2000 * 0.3 * 14 / 49 = 171, standard deviation 12.5.
    pairs = plan.masks.double().T @ plan.masks.double()
    assert ((pairs - pairs.diag().diag() - 171.4 * (1 - torch.eye(50))).abs() < 75).all()
    assert torch.equal(random_subsets(50, 5, 0.3, repeats=1, seed=3).masks, plan.masks[:5])
    assert not torch.equal(random_subsets(50, 5, 0.3, repeats=1, seed=4).masks, plan.masks[:5])


def test_seeds_differ_by_subset_and_repeat_for_lds_and_by_repeat_alone_for_removals() -> None:
    lds = list(random_subsets(10, 4, 0.5, repeats=3, seed=0))
    assert [(one.subset, one.repeat) for one in lds][:5] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1)]
    assert len({one.seed for one in lds}) == 12
    assert all(0 <= one.seed < 2**32 for one in lds)
    for plan in (leave_one_out(10, [1, 2], repeats=3, seed=0), removals(10, [[1], [2, 3]], repeats=3, seed=0)):
        assert len(plan) == 9
        assert len({(one.repeat, one.seed) for one in plan}) == len({one.seed for one in plan}) == 3
    other = random_subsets(10, 4, 0.5, repeats=3, seed=1)
    assert not {one.seed for one in other} & {one.seed for one in lds}


def test_left_out_samples_keep_their_order() -> None:
    plan = leave_one_out(5, torch.tensor([4, 0]), repeats=1, seed=0)
    assert (~plan.masks).nonzero().tolist() == [[1, 4], [2, 0]]
