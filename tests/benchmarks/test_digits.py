from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("sklearn")
import digits


@pytest.mark.parametrize(("name", "module"), [("mlp", digits.DigitsMLP), ("cnn", digits.DigitsCNN)])
def test_plain_training_follows_the_lightning_modules_recipe(
    name: str, module: type[digits.DigitsClassifier], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    setting = digits.SETTINGS[name]
    x_train, _, y_train, _ = digits.load(setting)
    batches = digits.shuffled_batches(200, epochs=1)
    assert [len(batch) for batch in batches] == [64, 64, 64, 8]
    model = module()
    plain = setting.network()
    plain.load_state_dict(model.network.state_dict())
    initial = nn.utils.parameters_to_vector(plain.parameters()).detach().clone()

    digits.train(plain, x_train, y_train, batches * 2)
    loader = DataLoader(digits.DigitsData(setting).train_set, batch_sampler=[batch.tolist() for batch in batches])
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)

    learned = nn.utils.parameters_to_vector(plain.parameters())
    assert (learned - initial).abs().max() > 0.01
    torch.testing.assert_close(nn.utils.parameters_to_vector(model.parameters()), learned, rtol=0, atol=1e-4)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0


def test_the_optimizer_is_sgd_with_momentum_weight_decay_and_a_linear_schedule() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, dtype=torch.float64))
    theta, velocity = weight.detach().clone(), torch.zeros(5, dtype=torch.float64)
    optimizer, schedule = digits.sgd(iter([weight]), steps=4)
    for step in range(4):
        optimizer.zero_grad()
        weight.pow(3).sum().backward()
        optimizer.step()
        schedule.step()
        velocity = 0.9 * velocity + 3 * theta**2 + 1e-3 * theta
        theta -= 0.05 * (1 - step / 4) * velocity
    torch.testing.assert_close(weight.detach(), theta)


def test_the_split_has_the_shapes_of_each_setting() -> None:
    for setting in digits.SETTINGS.values():
        x_train, x_test, y_train, y_test = digits.load(setting)
        assert x_train.shape == (1437, *setting.input_shape)
        assert x_test.shape == (360, *setting.input_shape)
        assert x_train.dtype == torch.float32
        assert (x_train.min(), x_train.max()) == (0, 1)
        assert (y_train.shape, y_test.shape) == ((1437,), (360,))
        assert setting.network()(x_test).shape == (360, 10)


def test_margin_is_the_log_odds_of_the_label() -> None:
    scores, y = torch.randn(7, 10, dtype=torch.float64), torch.arange(7)
    probability = scores.softmax(1)[torch.arange(7), y]
    torch.testing.assert_close(digits.margin(scores, y), torch.logit(probability))


def test_subsets_are_distinct_halves() -> None:
    masks = digits.subset_masks(seed=1)
    assert masks.dtype == torch.bool
    assert masks.sum(1).tolist() == [718] * 100
    assert len(masks.unique(dim=0)) == 100
    assert not torch.equal(masks, digits.subset_masks(seed=2))


def test_ground_truth_is_trained_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "N_SUBSETS", 2)
    monkeypatch.setattr(digits, "N_RUNS", 2)
    setting = digits.Setting("mlp", digits.mlp, (64,), epochs=1)
    masks, outputs = digits.ground_truth(setting, "tune", tmp_path)
    assert (masks.shape, masks.dtype) == ((2, 1437), torch.bool)
    assert (outputs.shape, outputs.dtype) == ((2, 2, 360), torch.float32)

    monkeypatch.setattr(digits, "retrain", None)
    assert torch.equal(digits.ground_truth(setting, "tune", tmp_path)[1], outputs)
    longer = digits.Setting("mlp", digits.mlp, (64,), epochs=2)
    assert digits.cache_path(longer, "tune", tmp_path) != digits.cache_path(setting, "tune", tmp_path)


def test_every_retrained_model_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "N_RUNS", 2)
    setting = digits.Setting("mlp", digits.mlp, (64,), epochs=1)
    one_subset_twice = digits.subset_masks(seed=1)[[0, 0]]
    outputs = digits.retrain(setting, one_subset_twice, seed=1)
    assert len(outputs.flatten(0, 1).unique(dim=0)) == 4
    assert torch.equal(outputs, digits.retrain(setting, one_subset_twice, seed=1))
    assert not torch.equal(outputs, digits.retrain(setting, one_subset_twice, seed=2))
