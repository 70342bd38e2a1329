"""Labels of the Fisher information: drawn by row and key alone, or listed so that the expectation is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Laplace, Normal

from lightning_attr.curvature import fisher
from lightning_attr.curvature.fisher import RepeatedPasses, fisher_batch, quadrature, sample, usual_labels
from lightning_attr.gradients import HookedGradients
from lightning_attr.outputs import BinaryMargin, ModelOutput, MulticlassMargin, NegativeLoss, Regression

ROWS = range(20000)


def test_categorical_draws_have_their_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    drawn = sample(Categorical(probs=probabilities.expand(20000, 4)), ROWS, 0)
    assert drawn.dtype == torch.int64
    assert torch.allclose(drawn.bincount(minlength=4) / 20000, probabilities, atol=0.015)
    assert (drawn != 1).all()


def test_bernoulli_draws_have_their_probabilities() -> None:
    drawn = sample(Bernoulli(probs=torch.full((20000, 1), 0.3)), ROWS, 0)
    assert drawn.shape == (20000, 1)
    assert abs(drawn.mean() - 0.3) < 0.015
    assert set(drawn.unique().tolist()) == {0, 1}


def test_normal_draws_have_their_moments() -> None:
    drawn = sample(Normal(torch.full((20000, 2), 3.0), 2.0), ROWS, 0)
    assert torch.allclose(drawn.mean(0), torch.full((2,), 3.0), atol=0.06)
    assert torch.allclose(drawn.T.cov(), 4 * torch.eye(2), atol=0.15)
    assert abs(((drawn - 3) / 2).pow(4).mean() - 3) < 0.2  # a normal's kurtosis


@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "normal"])
def test_draws_depend_on_row_and_key_alone(kind: str) -> None:
    values = torch.randn(10, 3, 5)

    def draw(rows: list[int], *key: object) -> Tensor:
        given = values[rows]
        kinds = {
            "categorical": Categorical(logits=given),
            "bernoulli": Bernoulli(logits=given),
            "normal": Normal(given, 1.0),
        }
        return sample(kinds[kind], rows, *key)

    whole = draw(list(range(10)), 0, "final")
    assert torch.equal(draw([7, 2, 4], 0, "final"), whole[[7, 2, 4]])
    assert not torch.equal(draw(list(range(10)), 1, "final"), whole)
    assert not torch.equal(draw(list(range(10)), 0, "epoch=1"), whole)


def test_certain_labels_are_always_drawn() -> None:
    logits = torch.tensor([[0.0, -1000.0], [-1000.0, 0.0]])
    assert sample(Categorical(logits=logits.repeat(500, 1)), range(1000), 0).tolist() == [0, 1] * 500


def test_quadrature_of_labels_is_the_distribution() -> None:
    logits = torch.randn(4, 3)
    weights, labels = quadrature(Categorical(logits=logits.repeat(3, 1)), 12)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.allclose(weights.view(3, 4), logits.softmax(1).T)
    weights, labels = quadrature(Bernoulli(probs=torch.full((8, 1), 0.25)), 8)
    assert weights.tolist() == [0.75] * 4 + [0.25] * 4
    assert labels.tolist() == [[0.0]] * 4 + [[1.0]] * 4


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)])
def test_quadrature_of_a_normal_has_its_covariance(shape: tuple[int, ...]) -> None:
    mean = torch.randn(shape)
    count = shape[1] if len(shape) > 1 else 1
    mean = mean.repeat(count, *[1] * (len(shape) - 1))
    weights, y = quadrature(Normal(mean, 2.0), 4 * count)
    steps = (y - mean).view(count, 4, -1)
    covariance = torch.einsum("kb,kbi,kbj->bij", weights.view(count, 4), steps, steps)
    assert torch.allclose(covariance, 4 * torch.eye(shape[1] if len(shape) > 1 else 1).expand(4, -1, -1))


def test_other_distributions_are_refused() -> None:
    other = Laplace(torch.zeros(2), 1.0)
    for function in (lambda: sample(other, [0, 1], 0), lambda: quadrature(other, 2)):
        with pytest.raises(TypeError, match=r"to return a Categorical, Bernoulli or Normal of .* but got Laplace"):
            function()


def test_combinations_of_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r'one target a sample for `labels="exact"`, but got \(2, 3\) for 2 samples'):
        quadrature(Categorical(logits=torch.zeros(2, 3, 5)), 2)


def module_and_gradients() -> tuple[nn.Module, HookedGradients]:
    module = nn.Linear(2, 3).double()
    return module, HookedGradients(module, ["weight", "bias"], direct=())


@pytest.mark.parametrize("model_output", [MulticlassMargin(), MulticlassMargin(2.0), BinaryMargin(), Regression(0.5)])
def test_exact_labels_give_the_curvature_of_the_loss(model_output: ModelOutput) -> None:
    torch.manual_seed(0)
    several = isinstance(model_output, MulticlassMargin)
    module = nn.Linear(2, 3 if several else 1, bias=False).double()
    x = torch.randn(1, 2, dtype=torch.float64)
    y = torch.zeros(1, dtype=torch.long if several else torch.float64)
    hooks = HookedGradients(module, ["weight"], direct=())
    batch = fisher_batch(hooks, lambda b: (module(b[0]), b[1]), (x, y), model_output, [0], labels="exact")
    rows: list[Tensor] = []
    for stream in batch.streams:
        stream(lambda gradients: rows.extend(gradients["weight"].materialise().flatten(1)))
    hessian = torch.autograd.functional.hessian(
        lambda weight: model_output.loss(x @ weight.T, y).sum(), module.weight.detach()
    )
    fisher = sum(torch.outer(g, g) for g in rows)
    assert torch.allclose(fisher, hessian.reshape(fisher.shape), rtol=1e-10, atol=1e-12)
    assert (batch.samples, batch.labels) == (1, 3 if several else 1 + isinstance(model_output, BinaryMargin))


@pytest.mark.parametrize("model_output", [MulticlassMargin(), BinaryMargin(), Regression(0.5)])
def test_mixed_labels_have_the_expectation_of_exact_ones(model_output: ModelOutput) -> None:
    torch.manual_seed(0)
    several, copies = isinstance(model_output, MulticlassMargin), 4000
    module = nn.Linear(2, 3 if several else 1, bias=False).double()
    x = torch.randn(1, 2, dtype=torch.float64)
    y = torch.zeros(1, dtype=torch.long if several else torch.float64)
    hooks = HookedGradients(module, ["weight"], direct=())

    def moment(labels: Any, count: int, draws: int = 1) -> Tensor:
        given = x.expand(count, 2), y.expand(count)
        batch = fisher_batch(
            hooks, lambda b: (module(b[0]), b[1]), given, model_output, range(count), labels=labels, draws=draws
        )
        assert (batch.samples, len(batch.streams)) == (count, draws)
        rows: list[Tensor] = []
        for stream in batch.streams:
            stream(lambda gradients: rows.extend(gradients["weight"].materialise().flatten(1)))
        return torch.stack([torch.outer(g, g) for g in rows]).sum(0) / count

    exact = moment("exact", 1)
    for draws in (1, 2):
        found = moment("mixed", copies, draws)
        assert (found - exact).abs().max() < 0.06 * exact.abs().max()


def test_mixed_labels_depend_on_row_and_key_alone() -> None:
    module, hooks = module_and_gradients()
    x = torch.randn(6, 2).double()

    def weights(rows: list[int], labels: int = 0, key: tuple[object, ...] = (0,)) -> list[Tensor]:
        batch = (x[rows], torch.full((len(rows),), labels))
        found: list[Tensor] = []
        for stream in fisher_batch(
            hooks, lambda b: (module(b[0]), b[1]), batch, MulticlassMargin(), rows, labels="mixed", key=key, draws=2
        ).streams:
            stream(lambda gradients: found.append(gradients["weight"].materialise()))
        return found

    first, second = weights([*range(6)])
    for whole, part in zip((first, second), weights([4, 1], labels=2), strict=True):
        torch.testing.assert_close(part, whole[[4, 1]])
    assert not torch.allclose(first.abs(), second.abs())
    assert not torch.allclose(first.abs(), weights([*range(6)], key=(1,))[0].abs())


@pytest.mark.parametrize("size", [1, 2, 7, 20])
def test_exact_labels_take_no_more_memory_than_one(size: int) -> None:
    module, hooks = module_and_gradients()
    x, y, sizes = torch.randn(size, 2).double(), torch.zeros(size).long(), []

    def step(batch: Any) -> Any:
        sizes.append(len(batch[0]))
        return module(batch[0]), batch[1]

    batch = fisher_batch(hooks, step, (x, y), MulticlassMargin(), range(size), labels="exact")
    for stream in batch.streams:
        stream(lambda gradients: None)
    assert sizes.pop(0) == 1
    assert sum(sizes) == 3 * size
    assert max(sizes) <= max(3, size)


def test_usual_labels_are_exact_where_they_are_few() -> None:
    few = [Categorical(logits=torch.zeros(2, 16)), Bernoulli(probs=torch.zeros(2, 1)), Normal(torch.zeros(2, 16), 1.0)]
    assert [usual_labels(distribution, 2) for distribution in few] == ["exact"] * 3
    assert [usual_labels(distribution, 2, draws=1) for distribution in few] == ["mixed"] * 3
    assert [usual_labels(distribution, 2, draws=2) for distribution in few] == ["mixed", "exact", "mixed"]
    many = [
        Categorical(logits=torch.zeros(2, 17)),
        Categorical(logits=torch.zeros(2, 5, 3)),
        Bernoulli(probs=torch.zeros(2, 2)),
        Normal(torch.zeros(2, 17), 1.0),
    ]
    for draws in (None, 1):
        assert [usual_labels(distribution, 2, draws) for distribution in many] == ["sampled"] * 4
    with pytest.raises(TypeError, match=r"but got Laplace"):
        usual_labels(Laplace(torch.zeros(2), 1.0), 2)


def test_observed_labels_give_the_gradient_of_the_loss() -> None:
    module, hooks = module_and_gradients()
    x, y = torch.randn(4, 2).double(), torch.tensor([0, 1, 2, 0])
    found: dict[str, Any] = {}
    (stream,) = fisher_batch(
        hooks, lambda b: (module(b[0]), b[1]), (x, y), MulticlassMargin(), range(4), labels="observed"
    ).streams
    stream(found.update)
    nn.functional.cross_entropy(module(x), y, reduction="sum").backward()
    assert torch.allclose(found["weight"].materialise().sum(0), module.weight.grad)


def test_sampled_labels_do_not_depend_on_the_observed_ones() -> None:
    module, hooks = module_and_gradients()
    x = torch.randn(64, 2).double()
    totals = []
    for y, key in ((torch.zeros(64), (0,)), (torch.ones(64), (0,)), (torch.zeros(64), (1,))):
        found: dict[str, Any] = {}
        (stream,) = fisher_batch(
            hooks, lambda b: (module(b[0]), b[1]), (x, y.long()), MulticlassMargin(), range(64), key=key
        ).streams
        stream(found.update)
        totals.append(found["weight"].materialise())
    assert torch.equal(totals[0], totals[1])
    assert not torch.equal(totals[0], totals[2])


@pytest.mark.parametrize("labels", ["sampled", "exact", "mixed"])
def test_loss_without_distribution_is_refused(labels: Any) -> None:
    module, hooks = module_and_gradients()
    x, y = torch.randn(4, 2).double(), torch.zeros(4)
    loss = NegativeLoss(lambda outputs, targets: outputs.sum(1))

    def run() -> None:
        for stream in fisher_batch(
            hooks, lambda b: (module(b[0]), b[1]), (x, y), loss, range(4), labels=labels
        ).streams:
            stream(lambda gradients: None)

    with pytest.raises(NotImplementedError, match="NegativeLoss does not say which distribution"):
        run()


def test_unknown_labels_are_refused() -> None:
    _, hooks = module_and_gradients()
    with pytest.raises(ValueError, match="`labels` to be one of sampled, observed, exact, mixed, but got 'true'"):
        fisher_batch(hooks, lambda b: (None, None), (), Regression(), [0], labels="true")  # type: ignore[arg-type]


@pytest.mark.parametrize(("limit", "reads"), [(2**20, 1), (100, 2), (0, 2)])
def test_passes_that_are_small_are_read_once(limit: int, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "_KEPT_BYTES", limit)
    layer, counts = nn.Linear(2, 1), []
    hooks = HookedGradients(layer, ["weight", "bias"], direct=())
    data = [(torch.randn(3, 2), torch.randn(3)) for _ in range(4)]

    def read() -> Any:
        counts.append(0)
        for batch in data:
            counts[-1] += 1
            step = lambda b: (layer(b[0]), b[1])  # noqa: E731 - of this batch
            yield fisher_batch(hooks, step, batch, Regression(), range(3), labels="observed")

    def total() -> tuple[Tensor, int]:
        found: list[Tensor] = []
        batches = 0
        for batch in passes(0):
            batches += batch.samples
            for stream in batch.streams:
                stream(lambda gradients: found.append(gradients["weight"].materialise()))
        assert not any(gradient.requires_grad for gradient in found)
        return torch.cat(found), batches

    passes = RepeatedPasses(read)
    (first, samples), (second, again) = total(), total()
    assert torch.equal(first, second)
    assert samples == again == 12
    assert counts == [4] * reads
