"""Unrolled segments against matrix exponentials."""

from __future__ import annotations

import torch
from influence_cases import network
from torch import Tensor

from lightning_attr.curvature.kronecker_factors import KroneckerFactors
from lightning_attr.curvature.kronecker_inverse import in_eigenbasis
from lightning_attr.curvature.unrolling import UnrolledSegment, response
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods import EKFAC
from lightning_attr.methods.solvers.layerwise import fit_factors

P, TIME, DECAY = 43, 3.0, 0.2
EYE = torch.eye(P).double()


def factors() -> KroneckerFactors:
    module, train, targets = network()
    return fit_factors(EKFAC("exact"), [SnapshotModel.of(module.eval(), [train], [targets])], "ggn", 0).factors


def dense(found: KroneckerFactors) -> Tensor:
    return in_eigenbasis(found, EYE, {name: block.second_moments for name, block in found.blocks.items()})


def test_a_response_is_right_near_zero_and_far_from_it() -> None:
    eigenvalues = torch.tensor([0.0, 1e-12, 1e-9, 1e-3, 1.0, 1e6]).double()
    expected = [2.0, 2.0, 2.0, 2.0 - 2e-3, 1 - torch.tensor(-2.0).double().exp(), 1e-6]
    torch.testing.assert_close(response(eigenvalues, 2.0), torch.tensor(expected).double(), rtol=1e-6, atol=1e-12)


def test_without_a_metric_it_is_the_matrix_exponential() -> None:
    found = factors()
    h = dense(found) + DECAY * EYE
    left = torch.matrix_exp(-TIME * h)
    r, q = UnrolledSegment(found, TIME, weight_decay=DECAY).back(EYE)
    torch.testing.assert_close(r, torch.linalg.solve(h, EYE - left))
    torch.testing.assert_close(q, left)


def test_a_metric_of_one_number_makes_time_pass_faster() -> None:
    found = factors()
    r, q = UnrolledSegment(found, TIME, metric=2 * torch.ones(P).double(), weight_decay=DECAY).back(EYE)
    expected = UnrolledSegment(found, 2 * TIME, weight_decay=DECAY).back(EYE)
    torch.testing.assert_close(r, expected[0])
    torch.testing.assert_close(q, expected[1])
    r, q = UnrolledSegment(found, TIME, metric=2 * torch.ones(P).double(), weight_decay=DECAY, decoupled=True).back(EYE)
    h = 2 * dense(found) + DECAY * EYE
    left = torch.matrix_exp(-TIME * h)
    torch.testing.assert_close(r, 2 * torch.linalg.solve(h, EYE - left))
    torch.testing.assert_close(q, left)


def test_a_metric_counts_by_its_diagonal_in_the_eigenbasis() -> None:
    found = factors()
    metric = torch.rand(P, generator=torch.Generator().manual_seed(0)).double()
    metric[3] = 0.0  # a parameter that does not move
    r, q = UnrolledSegment(found, TIME, metric=metric).back(EYE)
    ones = {name: torch.zeros_like(block.second_moments) for name, block in found.blocks.items()}
    basis, values = [], []
    for name, block in found.blocks.items():  # every eigenvector, one after the other
        for index in torch.ones_like(block.second_moments).nonzero():
            unit = {key: own.clone() for key, own in ones.items()}
            unit[name][tuple(index)] = 1.0
            projector = in_eigenbasis(found, EYE, unit)
            v = torch.linalg.eigh(projector)[1][:, -1]
            basis.append(v)
            values.append(block.second_moments[tuple(index)] * (metric * v.square()).sum())
    v, root = torch.stack(basis, 1), metric.sqrt()
    h = v @ torch.stack(values).diag() @ v.T
    left = torch.matrix_exp(-TIME * h)
    inner = v @ response(torch.stack(values), TIME).diag() @ v.T
    torch.testing.assert_close(r, root[:, None] * inner * root)
    back = torch.where(root > 0, 1 / root, 0.0)
    torch.testing.assert_close(q, EYE - root[:, None] * (EYE - left) * back)
    assert not r[3].any()
