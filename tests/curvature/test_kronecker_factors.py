"""K-FAC and EK-FAC against dense Fisher matrices, in float64: where they are exact, and what always holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from torch.nn import functional as F

from lightning_attr.curvature.fisher import GradientBatch, fisher_batch
from lightning_attr.curvature.kronecker_factors import KroneckerFactors
from lightning_attr.curvature.kronecker_inverse import KroneckerInverse
from lightning_attr.curvature.kronecker_layout import KroneckerLayout
from lightning_attr.errors import NonFiniteGradientError
from lightning_attr.gradients import HookedGradients
from lightning_attr.outputs import BinaryMargin, ModelOutput, MulticlassMargin, NegativeLoss, Regression


class VectorRegression(ModelOutput):
    """Half the squared distance, for targets of several values."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1) / 2

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -self.loss(outputs, targets)

    def out_to_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.ones(len(outputs))

    def distribution(self, outputs: Tensor, targets: Tensor) -> Distribution:
        return Normal(outputs, 1.0)


@pytest.fixture(autouse=True)
def float64() -> Iterable[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def fit(
    module: nn.Module,
    model_output: ModelOutput,
    x: Tensor,
    y: Tensor,
    labels: Any = "exact",
    batch_size: int = 4,
    rows: range | None = None,
    seed: int = 0,
    **settings: Any,
) -> KroneckerFactors:
    layout = KroneckerLayout.of(module.eval())
    hooks = HookedGradients(module, layout.names, direct=())
    rows = range(len(x)) if rows is None else rows

    def passes(number: int) -> Iterable[GradientBatch]:
        for start in range(0, len(rows), batch_size):
            part = list(rows[start : start + batch_size])
            yield fisher_batch(
                hooks,
                lambda batch: (module(batch[0]), batch[1]),
                (x[part], y[part]),
                model_output,
                part,
                labels=labels,
                key=(seed, number),
            )

    return KroneckerFactors.fit(layout, passes, **{"dtype": x.dtype, **settings})


def dense(factors: KroneckerFactors, weight: str, method: Any) -> Tensor:
    """The block as a matrix of vectorised (d_o, d_i + 1) gradients, groups one after the other."""
    block = factors.blocks[weight]
    eigenvalues = block.eigenvalues(method)
    bases = [torch.kron(*sides) for sides in zip(block.rows_basis, block.columns_basis, strict=True)]
    return torch.block_diag(*(q @ torch.diag(e.flatten()) @ q.T for q, e in zip(bases, eigenvalues, strict=True)))


def layer_gradient(layer: nn.Module, loss: Tensor) -> Tensor:
    """The gradient of one loss as vectorised (d_o, d_i + 1)."""
    gradients = torch.autograd.grad(loss, list(layer.parameters(recurse=False)), retain_graph=True)
    return torch.cat([g.reshape(len(gradients[0]), -1) for g in gradients], 1).flatten()


def dense_fisher(
    module: nn.Module, layer: nn.Module, losses: Callable[[Tensor], list[tuple[Tensor, Tensor]]], x: Tensor
) -> Tensor:
    """The mean over samples of weighted outer products; ``losses`` gives (weight, loss) from a sample's output."""
    total: Any = 0
    for i in range(len(x)):
        for weight, loss in losses(module(x[i : i + 1])):
            g = layer_gradient(layer, loss)
            total = total + weight.detach() * torch.outer(g, g)
    return total / len(x)


def classes(logits: Tensor) -> list[tuple[Tensor, Tensor]]:
    log_probabilities = logits.log_softmax(1)[0]
    return [(entry.exp(), -entry) for entry in log_probabilities]


def directions(outputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(torch.ones(()), entry) for entry in outputs[0]]


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-12 * (1 + expected.abs().max()))


def mlp(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, classes))


def test_one_linear_layer_with_squared_loss_is_exact() -> None:  # T-EK-1
    layer, x = nn.Linear(4, 3, bias=False), torch.randn(10, 4)
    factors = fit(layer, VectorRegression(), x, torch.randn(10, 3))
    ggn = torch.kron(torch.eye(3), x.T @ x / 10)
    vectors = torch.randn(2, 12)
    for method in ("kfac", "ekfac"):
        assert close(dense(factors, "weight", method), ggn)
        damped = ggn + 0.1 * ggn.diagonal().mean() * torch.eye(12)
        solved = KroneckerInverse(factors, damping=0.1, method=method).apply(vectors)
        assert close(solved, torch.linalg.solve(damped, vectors.T).T)


def test_sampled_labels_give_the_same_in_expectation() -> None:
    layer, x = nn.Linear(4, 3, bias=False), torch.randn(10, 4).repeat(2000, 1)
    factors = fit(layer, VectorRegression(), x, torch.zeros(20000, 3), labels="sampled", batch_size=5000)
    ggn = torch.kron(torch.eye(3), x.T @ x / len(x))
    assert (dense(factors, "weight", "kfac") - ggn).norm() < 0.03 * ggn.norm()
    other = fit(layer, VectorRegression(), x, torch.zeros(20000, 3), labels="sampled", batch_size=5000, seed=1)
    assert not close(dense(other, "weight", "kfac"), dense(factors, "weight", "kfac"))


def test_blocks_of_a_deep_linear_network_are_exact() -> None:  # T-EK-2
    module, x = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3)), torch.randn(10, 4)
    factors = fit(module, VectorRegression(), x, torch.randn(10, 3))
    weight = module[1].weight.detach()
    assert close(dense(factors, "0.weight", "kfac"), torch.kron(weight.T @ weight, x.T @ x / 10))
    assert close(dense(factors, "1.weight", "kfac"), dense_fisher(module, module[1], directions, x))


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_one_sample_is_exact(method: str) -> None:  # T-EK-3
    module, x = mlp(), torch.randn(1, 4)
    factors = fit(module, MulticlassMargin(), x, torch.tensor([0]))
    for name, layer in (("0.weight", module[0]), ("2.weight", module[2])):
        assert close(dense(factors, name, method), dense_fisher(module, layer, classes, x))


@pytest.mark.parametrize("model_output", [Regression(), BinaryMargin()])
def test_one_hot_inputs_are_exact(model_output: ModelOutput) -> None:  # T-EK-4
    layer, x = nn.Linear(4, 1, bias=False), torch.eye(4)[torch.tensor([0, 1, 1, 2, 3, 3, 3])]
    factors = fit(layer, model_output, x, torch.zeros(7))
    probability = layer(x).sigmoid().detach().squeeze(1)
    curvature = probability * (1 - probability) if isinstance(model_output, BinaryMargin) else torch.ones(7)
    expected = torch.diag((x.T * curvature).sum(1) / 7)
    assert close(dense(factors, "weight", "ekfac"), expected)


@pytest.mark.parametrize("labels", ["exact", "sampled", "observed"])
def test_trace_is_the_mean_squared_length(labels: Any) -> None:  # T-EK-5
    module, x, y = mlp(), torch.randn(10, 4), torch.randint(3, (10,))
    factors = fit(module, MulticlassMargin(), x, y, labels)
    if labels == "exact":
        expected = dense_fisher(module, module[0], classes, x).trace()
        assert not close(factors.blocks["0.weight"].eigenvalues("kfac").sum(), expected)
    elif labels == "observed":
        expected = (
            sum(
                layer_gradient(module[0], F.cross_entropy(module(x[i : i + 1]), y[i : i + 1])).square().sum()
                for i in range(10)
            )
            / 10
        )
    else:
        layout = KroneckerLayout.of(module)
        hooks = HookedGradients(module, layout.names, direct=())
        batch = fisher_batch(hooks, lambda b: (module(b[0]), b[1]), (x, y), MulticlassMargin(), range(10), key=(0, 1))
        squares: list[Tensor] = []
        batch.streams[0](lambda g: squares.extend(v.materialise().square().sum() for n, v in g.items() if n[0] == "0"))
        expected = sum(squares) / 10
    assert close(factors.blocks["0.weight"].eigenvalues("ekfac").sum(), expected)


def test_softmax_layer_of_several_samples_is_not_exact() -> None:  # T-EK-6
    layer, x = nn.Linear(4, 3), torch.randn(10, 4)
    factors = fit(layer, MulticlassMargin(), x, torch.zeros(10, dtype=torch.long))
    fisher, found = dense_fisher(layer, layer, classes, x), dense(factors, "weight", "ekfac")
    assert not close(found, fisher)
    assert close(found.trace(), fisher.trace())
    assert (factors.blocks["weight"].eigenvalues("ekfac") >= 0).all()


def test_corrected_eigenvalues_are_closer() -> None:  # T-EK-7
    module, x = mlp(), torch.randn(20, 4)
    factors = fit(module, MulticlassMargin(), x, torch.zeros(20, dtype=torch.long))
    for name, layer in (("0.weight", module[0]), ("2.weight", module[2])):
        fisher = dense_fisher(module, layer, classes, x)
        ekfac, kfac = ((dense(factors, name, method) - fisher).norm() for method in ("ekfac", "kfac"))
        assert ekfac < 0.99 * kfac
        q = torch.kron(factors.blocks[name].rows_basis[0], factors.blocks[name].columns_basis[0])
        assert close(factors.blocks[name].second_moments.flatten(), (q.T @ fisher @ q).diagonal())


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.Conv2d(6, 5, 2), nn.Flatten(), nn.Linear(20, 3)
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(groups: int) -> None:
    conv = nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=groups)
    module = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(8 * 3 * 4, 2))
    x = torch.randn(6, 4, 5, 6)
    factors = fit(module, MulticlassMargin(), x, torch.zeros(6, dtype=torch.long))
    inputs = x.unflatten(1, (groups, -1)).transpose(0, 1)  # (g, b, c, h, w)
    moments_a, moments_s, fisher = [], [], []
    outputs = conv(x)
    for i in range(6):
        for weight, loss in classes(module[1:](outputs[i : i + 1])):
            (delta,) = torch.autograd.grad(loss, outputs, retain_graph=True)
            delta = (weight.detach().sqrt() * delta[i]).reshape(groups, -1, 12)
            for g in range(groups):
                unfolded = F.unfold(inputs[g][i : i + 1], (3, 2), (1, 2), (1, 0), (2, 1))[0]  # (c * 6, 12)
                unfolded = torch.cat([unfolded, torch.ones(1, 12)])
                gradient = (delta[g] @ unfolded.T).flatten()
                moments_a.append(unfolded @ unfolded.T)
                moments_s.append(delta[g] @ delta[g].T)
                fisher.append(torch.outer(gradient, gradient))
    a, s, f = (torch.stack(m).unflatten(0, (12, groups)).sum(0) for m in (moments_a, moments_s, fisher))
    expected = torch.block_diag(*(torch.kron(s[g] / 6, a[g] / (12 * 12)) for g in range(groups)))
    assert close(dense(factors, "0.weight", "kfac"), expected)
    for g in range(groups):
        block = factors.blocks["0.weight"]
        q = torch.kron(block.rows_basis[g], block.columns_basis[g])
        assert close(block.second_moments[g].flatten(), (q.T @ f[g] @ q).diagonal() / 6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_factors_do_not_depend_on_the_batch_size(dtype: torch.dtype, tolerance: float) -> None:
    module, x, y = small_cnn().to(dtype), torch.randn(12, 4, 6, 6).to(dtype), torch.randint(3, (12,))
    by_size = [fit(module, MulticlassMargin(), x, y, "sampled", batch_size) for batch_size in (1, 5, 12)]
    vectors = torch.randn(3, by_size[0].layout.parameters.numel).to(dtype)
    expected, *others = [KroneckerInverse(factors).apply(vectors) for factors in by_size]
    for found in others:
        assert (found - expected).norm() <= 100 * tolerance * expected.norm()
    for name, block in by_size[0].blocks.items():
        for other in by_size[1:]:
            ratio = other.blocks[name].second_moments.sum() / block.second_moments.sum()
            assert abs(ratio - 1) <= tolerance


def test_two_processes_give_what_one_does() -> None:
    module, x, y = small_cnn(), torch.randn(9, 4, 6, 6), torch.randint(3, (9,))
    vectors = torch.randn(2, KroneckerLayout.of(module).parameters.numel)
    expected = KroneckerInverse(fit(module, MulticlassMargin(), x, y, "sampled")).apply(vectors)
    # What each gives to a sum depends on the sums before: right for covariances from the first round on, for
    # eigenvalues from the second, and for what comes of them in the third.
    given: list[list[Tensor]] = [[], []]
    for _ in range(3):
        giving: list[list[Tensor]] = [[], []]
        found = []
        for rank, rows in enumerate((range(4), range(4, 9))):
            own, others = giving[rank], given[1 - rank]

            def reduce(tensor: Tensor, own: list[Tensor] = own, others: list[Tensor] = others) -> Tensor:
                own.append(tensor.clone())
                return tensor.add_(others[len(own) - 1]) if others else tensor

            factors = fit(module, MulticlassMargin(), x, y, "sampled", rows=rows, reduce=reduce)
            found.append(KroneckerInverse(factors).apply(vectors))
        given = giving
    assert factors.samples == 9
    assert close(found[0], expected)
    assert close(found[1], expected)


def test_masked_positions_count_nowhere() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            kept = x[..., :1] != 99
            return (self.second(self.first(x[..., 1:]).tanh()) * kept).sum(1)

    module, x = Tokens(), torch.randn(5, 3, 4)
    padded = torch.cat([x, torch.randn(5, 4, 4)], 1)
    padded[:, 3:, 0] = 99
    y = torch.randint(2, (5,))
    expected, found = (fit(module, MulticlassMargin(), inputs, y) for inputs in (x, padded))
    for name in ("first.weight", "second.weight"):
        for method in ("kfac", "ekfac"):
            assert close(dense(found, name, method), dense(expected, name, method))
    assert torch.allclose(  # the mean over positions, the sum over them of the other side
        found.blocks["first.weight"].columns_eigenvalues.sum(), (x[..., 1:].square().sum(-1) + 1).mean()
    )


def test_layer_called_twice_sums_before_it_squares() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(x).tanh()))

    module, x = Twice(), torch.randn(6, 4)
    factors = fit(module, MulticlassMargin(), x, torch.zeros(6, dtype=torch.long))
    fisher = dense_fisher(module, module.layer, classes, x)
    block = factors.blocks["layer.weight"]
    q = torch.kron(block.rows_basis[0], block.columns_basis[0])
    assert close(block.second_moments.flatten(), (q.T @ fisher @ q).diagonal())


def test_tied_head_is_left_out() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.inner, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(self.embedding(x).mean(1)).tanh())

    module, x = Tied(), torch.randint(5, (6, 3))
    factors = fit(module, MulticlassMargin(), x, torch.zeros(6, dtype=torch.long), dtype=torch.float64)
    assert list(factors.blocks) == ["inner.weight"]
    assert factors.layout.uncovered == ("embedding.weight",)
    assert (KroneckerInverse(factors).apply(torch.randn(2, factors.layout.parameters.numel))[:, :20] == 0).all()


def test_layers_that_no_gradient_reaches_are_named(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    module.unused = nn.Linear(2, 2)
    module.forward = lambda x: module[1](module[0](x))
    for _ in range(3):
        factors = fit(module, MulticlassMargin(), torch.randn(4, 4), torch.zeros(4, dtype=torch.long))
    assert list(factors.blocks) == ["0.weight"]
    assert factors.layout.uncovered == ("1.weight", "1.bias", "unused.weight", "unused.bias")
    assert factors.layout.share == 15 / 27
    said = "cover 55.6% of the parameters; `1.weight`, `1.bias`, `unused.weight`, `unused.bias` have none"
    assert caplog.text.count(said) == 1


def test_tensors_come_back_exactly() -> None:
    module, x = small_cnn(), torch.randn(5, 4, 6, 6)
    factors = fit(module, MulticlassMargin(), x, torch.zeros(5, dtype=torch.long))
    again = KroneckerFactors.from_tensors(factors.tensors(), KroneckerLayout.of(module))
    assert again.layout == factors.layout
    assert again.samples == factors.samples == 5
    assert again.tensors().keys() == factors.tensors().keys()
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in factors.tensors().items())


def test_tensors_of_another_module_are_refused() -> None:
    factors = fit(mlp(), MulticlassMargin(), torch.randn(4, 4), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"Expected argument `tensors` to hold factors of the shapes"):
        KroneckerFactors.from_tensors(factors.tensors(), KroneckerLayout.of(mlp(classes=4)))
    with pytest.raises(ValueError, match=r"the unknown names \['2.weight'\]"):
        KroneckerFactors.from_tensors(factors.tensors(), KroneckerLayout.of(nn.Sequential(nn.Linear(4, 5))))
    with pytest.raises(ValueError, match="belong to another module"):
        KroneckerFactors.from_tensors({}, KroneckerLayout.of(mlp()))


def test_gradients_that_are_not_finite_are_refused() -> None:
    loss = NegativeLoss(lambda outputs, targets: outputs.sum(1) * targets)
    x, y = torch.randn(4, 4), torch.tensor([1.0, 1.0, float("nan"), 1.0])
    with pytest.raises(NonFiniteGradientError, match=r"Kronecker factors of `0.weight` are NaN or Inf"):
        fit(mlp(), loss, x, y, "observed")


def test_gradients_that_are_all_zero_are_refused() -> None:
    loss = NegativeLoss(lambda outputs, targets: outputs.sum(1) * targets)
    with pytest.raises(ValueError, match="those of 4 samples are zero or missing in all"):
        fit(mlp(), loss, torch.randn(4, 4), torch.zeros(4), "observed")


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="to give at least one sample, but got none"):
        fit(mlp(), Regression(), torch.randn(4, 4), torch.zeros(4), rows=range(0))


def test_passes_of_different_length_are_refused() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layout = KroneckerLayout.of(layer)
    hooks = HookedGradients(layer, layout.names, direct=())
    batch = fisher_batch(hooks, lambda b: (layer(b[0]), b[1]), (torch.ones(2, 1), torch.zeros(2)), Regression(), [0, 1])
    with pytest.raises(ValueError, match="both passes to have the same samples, but got 2 and then 4"):
        KroneckerFactors.fit(layout, lambda number: [batch] * (1 + number), dtype=torch.float64)
