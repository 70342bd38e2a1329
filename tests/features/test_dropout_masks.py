from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_attr.func import dropout_ensemble

X = torch.randn(8, 5)


def network(rate: float = 0.4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 64), nn.BatchNorm1d(64), nn.Dropout(rate), nn.Linear(64, 64), nn.Dropout(rate)
    ).eval()


def run(module: nn.Module, x: Tensor, seed: int = 0) -> Tensor:
    with dropout_ensemble(module, seed):
        return module(x)


def test_the_mask_is_shared_by_all_samples_and_scaled() -> None:
    module = nn.Sequential(nn.Dropout(0.4)).eval()
    outputs = run(module, torch.ones(3, 10000))
    assert torch.equal(outputs[0], outputs[2])
    assert outputs[0].unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
    assert abs((outputs[0] == 0).float().mean() - 0.4) < 0.03


def test_outputs_are_those_of_one_sub_network() -> None:
    module = network()
    whole = run(module, X)
    torch.testing.assert_close(torch.cat([run(module, x[None]) for x in X]), whole)
    with dropout_ensemble(module, 0):
        hidden = module[2](torch.ones(1, 64))
    expected = module[3](module[1](module[0](X)) * hidden)
    kept = whole != 0
    torch.testing.assert_close(whole[kept], (expected / 0.6)[kept])
    assert torch.equal(kept, kept[:1].expand_as(kept))


def test_members_differ_and_repeat() -> None:
    module = network()
    assert torch.equal(run(module, X, 3), run(module, X, 3))
    assert not torch.equal(run(module, X, 3), run(module, X, 4))
    with dropout_ensemble(module, 0):
        first, second = (layer(torch.ones(1, 64)) for layer in (module[2], module[4]))
    assert not torch.equal(first, second)  # each layer has a mask of its own


def test_nothing_is_left_behind() -> None:
    module = network()
    before = module(X)
    with pytest.raises(KeyError), dropout_ensemble(module, 0):
        raise KeyError
    assert torch.equal(module(X), before)
    assert not any(layer._forward_hooks for layer in module.modules())


def test_per_sample_gradients_see_the_same_sub_network() -> None:
    module = network()
    params = {name: p.detach() for name, p in module.named_parameters()}

    def output(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, p, (x[None],)).sum()

    with dropout_ensemble(module, 0):
        rows = vmap(grad(output), in_dims=(None, 0))(params, X)
        module(X).sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(rows[name].sum(0), p.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "shape"), [(nn.Dropout1d, (4, 50, 3)), (nn.Dropout2d, (4, 50, 3, 2))])
def test_whole_channels_are_dropped(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    outputs = run(nn.Sequential(kind(0.5)).eval(), torch.ones(shape)).flatten(2)
    assert torch.equal(outputs[0], outputs[3])
    assert (outputs == outputs[..., :1]).all()
    assert 0.2 < (outputs[0, :, 0] == 0).float().mean() < 0.8


def test_shorter_sequences_have_the_beginning_of_the_mask() -> None:
    module = nn.Sequential(nn.Dropout(0.5)).eval()
    with dropout_ensemble(module, 0):
        long, short = module(torch.ones(2, 9, 7)), module(torch.ones(3, 4, 7))
    assert torch.equal(long[0, :4], short[0])


def test_all_or_nothing() -> None:
    assert not run(nn.Sequential(nn.Dropout(1.0)).eval(), X).any()
    with pytest.raises(
        ValueError, match=r"a dropout layer .* but Sequential has none. Functional dropout is not covered"
    ):
        run(network(0.0), X)


def test_what_is_not_covered_is_named() -> None:
    module = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), dropout_ensemble(module, 0) as others:
            assert others == ["self_attn"]
            masked = module(x)
        assert not torch.allclose(masked, module(x))
    with pytest.raises(ValueError, match=r"but LSTM has none; the dropout inside \[''\] is not covered"):
        run(nn.LSTM(3, 3, 2, dropout=0.2).eval(), x)
    with dropout_ensemble(nn.Sequential(nn.AlphaDropout(0.1), nn.Dropout(0.1)).eval(), 0) as others:
        assert others == ["0"]


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"evaluation mode, but its dropout layers \['2', '4'\] are in training mode"):
        run(network().train(), X)
