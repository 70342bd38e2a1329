"""Each setting runs end to end on its stand-in; what is missing or wrong is said before anything is trained."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import data
import numpy as np
import pytest
import run
import stand_ins
import texts
import torch
from midi import END
from settings import SETTINGS
from torch.utils.data import TensorDataset

from lightning_attr import AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import StoreMismatchError
from lightning_attr.features.featurizer import plan
from lightning_attr.methods import TRAK
from lightning_attr.projectors import KroneckerProjector


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """The command silences Lightning."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    yield
    log.setLevel(level)


def shorten(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The smallest run of a setting: two epochs of a few samples, two subsets, two seeds."""
    setting = SETTINGS[name]
    trainer = {"max_epochs": 2, **{k: v for k, v in setting.recipe.trainer.items() if not k.startswith("max")}}
    sizes = {
        "n_train": 16,
        "n_targets": 4,
        "batch_size": 8,
        "subsets": 2,
        "seeds": 2,
        "trainer": trainer,
        "proj_dim": 64,
    }
    short = replace(
        setting,
        recipe=replace(setting.recipe, **sizes),
        stand_in_recipe=replace(setting.stand_in_recipe, **sizes),
    )
    monkeypatch.setitem(run.SETTINGS, name, short)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_setting_runs_on_its_stand_in(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shorten(monkeypatch, name)
    run.main([name, "--stand-in", "--json", "figures.json", "--accelerator", "cpu"])
    figures, printed = json.loads(Path("figures.json").read_text("utf-8")), capsys.readouterr().out
    setting = SETTINGS[name]
    assert (figures["setting"], figures["stand_in"]) == (name, True)
    assert (figures["n_train"], figures["n_targets"], figures["found"]) == (16, 4, 0)
    assert all(math.isfinite(figures[key]) for key in ("lds", "low", "high"))
    assert ("auroc" in figures) == ("Noisy-label AUROC" in printed) == (name == "cifar10-dattri")
    assert list(figures["seconds"]) == ["one training", "one training with the callback", "attribute", "ground truth"]
    assert "On a stand-in for the data" in printed
    assert ("Reduced: " in printed) == bool(setting.stand_in_recipe.reduced)
    assert setting.published in printed
    assert f"{figures['parameters']:,} parameters" in printed
    assert not Path("out").exists()


def write_mnist(folder: Path, n: int = 20) -> None:
    random = np.random.default_rng(0)
    for part in ("train", "t10k"):
        for kind, shape in (("images-idx3", (n, 28, 28)), ("labels-idx1", (n,))):
            values = random.integers(0, 10, shape, np.uint8)
            header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + values.tobytes())


@pytest.mark.slow
def test_files_on_disk_take_the_place_of_the_stand_in_and_the_ground_truth_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shorten(monkeypatch, "mnist-lr")
    write_mnist(tmp_path)
    arguments = ["mnist-lr", "--data", str(tmp_path), "--flip", "0.25", "--accelerator", "cpu", "--json"]
    run.main([*arguments, "first.json"])
    printed = capsys.readouterr().out
    assert "stand-in" not in printed
    assert "Noisy-label AUROC" in printed
    assert "ground truth, 2 x 2  " in printed
    run.main([*arguments, "second.json"])
    assert "ground truth, 2 x 2 (4 were there)" in capsys.readouterr().out
    first, second = (json.loads(Path(f"{name}.json").read_text("utf-8")) for name in ("first", "second"))
    for key in ("lds", "auroc", "ceiling"):
        assert first[key] == second[key] or (math.isnan(first[key]) and math.isnan(second[key]))
    with pytest.raises(StoreMismatchError, match="its training samples differ"):
        run.main(["mnist-lr", "--data", str(tmp_path), "--accelerator", "cpu"])


@pytest.mark.slow
def test_nothing_is_retrained_without_subsets_and_one_seed_has_no_ceiling(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shorten(monkeypatch, "mnist-lr")
    run.main(["mnist-lr", "--stand-in", "--subsets", "0", "--accelerator", "cpu"])
    printed = capsys.readouterr().out
    assert "LDS 0" not in printed
    assert "ground truth" not in printed
    run.main(["mnist-lr", "--stand-in", "--subsets", "3", "--seeds", "1", "--accelerator", "cpu"])
    assert "Noise ceiling unknown: it takes --seeds 2 or more" in capsys.readouterr().out


@pytest.mark.parametrize("name", SETTINGS)
def test_missing_data_end_the_command_with_how_to_get_them(name: str, tmp_path: Path) -> None:
    for folder, reason in ((tmp_path / "nowhere", "there is no such folder"), (tmp_path, "no .* there")):
        with pytest.raises(SystemExit, match=rf"^{name}: Expected the data in {folder}, but {reason}\. .*https://"):
            run.main([name, "--data", str(folder)])


def test_broken_data_end_the_command_with_their_name(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"gone")
    with pytest.raises(SystemExit, match=r"^mnist-lr: Expected .*t10k-labels-idx1-ubyte to be an IDX file"):
        run.main(["mnist-lr", "--data", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnist", "--stand-in"], "invalid choice: 'mnist'"),
        (["mnist-lr"], "one of the arguments --data --stand-in is required"),
        (["mnist-lr", "--stand-in", "--data", "."], "not allowed with argument"),
        (["mnist-lr", "--stand-in", "--subsets", "1"], "expected --subsets to be 0, or 2 or more, but got 1"),
        (["mnist-lr", "--stand-in", "--subsets", "-2"], "expected --subsets to be 0, or 2 or more, but got -2"),
        (["mnist-lr", "--stand-in", "--seeds", "0"], "expected --seeds to be 1 or more, but got 0"),
        (["mnist-lr", "--stand-in", "--flip", "1"], r"expected --flip to be in \[0, 1\), but got 1.0"),
        (["maestro", "--stand-in", "--flip", "0.1"], "expected no --flip for maestro, which has no labels"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(arguments)

    assert re.search(message, capsys.readouterr().err)


# Data ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "x_shape", "y_shape"),
    [
        ("mnist-lr", (1, 28, 28), ()),
        ("mnist-mlp", (1, 28, 28), ()),
        ("cifar2-dattri", (3, 32, 32), ()),
        ("cifar10-dattri", (3, 32, 32), ()),
        ("cifar2-trak", (3, 32, 32), ()),
        ("cifar10-trak", (3, 32, 32), ()),
        ("maestro", (64,), (64,)),
        ("shakespeare", (64,), (64,)),
    ],
)
def test_stand_ins_have_the_shapes_of_the_data(name: str, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> None:
    setting, recipe = SETTINGS[name], SETTINGS[name].stand_in_recipe
    pair = setting.stand_in()
    made, mask = run.make_data(setting, recipe, pair, setting.flipped)
    assert (len(made.train), len(made.targets)) == (recipe.n_train, recipe.n_targets)
    for dataset in (made.train, made.targets):
        x, y = dataset[0]
        assert (x.shape, y.shape, y.dtype) == (x_shape, y_shape, torch.int64)
    if setting.classes is not None:
        labels = pair[0].tensors[1]
        assert labels.unique().tolist() == list(range(setting.classes))
        assert mask is None or mask.sum() == recipe.n_train // 10
    module = recipe.module()
    batch = next(iter(made.train_dataloader()))
    assert module.training_step(batch, 0).isfinite()


def test_only_what_is_trained_on_is_augmented() -> None:
    made, _ = run.make_data(
        SETTINGS["cifar2-trak"], SETTINGS["cifar2-trak"].stand_in_recipe, stand_ins.digits(3, 32, (3, 5)), 0
    )
    assert type(made.train).__name__ == "RandomFlips"
    assert isinstance(made.targets, TensorDataset)


def test_digits_keep_their_grey_levels_when_enlarged() -> None:
    train, targets = stand_ins.digits(3, 32)
    x, y = train.tensors
    assert (x.shape, len(targets), x.dtype) == ((1437, 3, 32, 32), 360, torch.uint8)
    assert torch.equal(x[:, 0], x[:, 2])
    assert 240 < x.max() <= 255
    assert x.min() == 0
    assert y.bincount().min() > 100


def test_documentation_has_as_many_characters_as_shakespeare() -> None:
    train, targets = stand_ins.documentation(64)
    assert len(train) > 1000
    assert len(targets) > 100
    assert train.tensors[0].max() < texts.VOCABULARY
    assert len(train.tensors[0].unique()) > 50


def test_melodies_are_the_same_each_time_and_no_target_is_a_training_block() -> None:
    train, targets = stand_ins.melodies(40, 10, length=64)
    again = stand_ins.melodies(40, 10, length=64)[0]
    assert torch.equal(train.tensors[0], again.tensors[0])
    assert train.tensors[0].max() < END
    blocks = {tuple(row.tolist()) for row in train.tensors[0]}
    assert len(blocks) == 40
    assert not blocks & {tuple(row.tolist()) for row in targets.tensors[0]}


def test_flipped_labels_are_other_classes_and_always_the_same() -> None:
    y = torch.arange(1000) % 10
    dataset = TensorDataset(torch.zeros(1000, 1), y)
    noisy, mask = data.flip_labels(dataset, 0.1, classes=10)
    assert mask.sum() == 100
    assert torch.equal(noisy.tensors[1] != y, mask)
    assert len((noisy.tensors[1] - y)[mask].remainder(10).unique()) == 9
    assert torch.equal(data.flip_labels(dataset, 0.1, classes=10)[0].tensors[1], noisy.tensors[1])


def test_labels_are_flipped_before_samples_are_chosen_for_nobody_else() -> None:
    setting = SETTINGS["mnist-lr"]
    pair = setting.stand_in()
    made, mask = run.make_data(setting, setting.stand_in_recipe, pair, 0.2)
    clean, none = run.make_data(setting, setting.stand_in_recipe, pair, 0)
    assert none is None
    assert torch.equal(made.train.tensors[1] != clean.train.tensors[1], mask)
    assert torch.equal(made.targets.tensors[1], clean.targets.tensors[1])
    with pytest.raises(ValueError, match="Expected no flipped labels for MAESTRO"):
        run.make_data(SETTINGS["maestro"], SETTINGS["maestro"].stand_in_recipe, SETTINGS["maestro"].stand_in(), 0.1)


def test_every_setting_has_the_published_recipe() -> None:
    """Rows as in dattri's benchmark and TRAK's quick start: samples, targets, batch, length, k."""
    found = {
        name: (s.recipe.n_train, s.recipe.n_targets, s.recipe.batch_size, s.recipe.trainer, s.recipe.proj_dim)
        for name, s in SETTINGS.items()
    }
    assert found == {
        "mnist-lr": (5000, 500, 32, {"max_epochs": 20}, 512),
        "mnist-mlp": (5000, 500, 64, {"max_epochs": 50}, 512),
        "cifar2-dattri": (5000, 500, 64, {"max_epochs": 10}, 512),
        "cifar10-dattri": (5000, 500, 64, {"max_epochs": 3}, 512),
        "cifar2-trak": (10_000, 2000, 512, {"max_epochs": 24}, 4096),
        "cifar10-trak": (50_000, 2000, 512, {"max_epochs": 24}, 4096),
        "maestro": (5000, 178, 64, {"max_epochs": 20}, 2048),
        "shakespeare": (3921, 435, 32, {"max_steps": 5000, "gradient_clip_val": 1.0}, 2048),
    }
    assert {s.recipe.subsets for s in SETTINGS.values()} == {100}
    assert not any(s.recipe.reduced for s in SETTINGS.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_top_proponent_of_a_training_sample_is_the_sample_itself(name: str, tmp_path: Path) -> None:
    setting, recipe = SETTINGS[name], SETTINGS[name].stand_in_recipe
    train = data.first(setting.prepare(setting.stand_in()[0]), 24)
    made = data.BenchmarkData(train, data.first(train, 6), batch_size=8)
    settings = {k: v for k, v in recipe.trainer.items() if not k.startswith("max")}
    # Neither a learned projection nor random directions, which 24 samples would follow more than themselves.
    method = TRAK(projector=KroneckerProjector(256), kernel="margin")
    callback = AttributionCallback(tmp_path / "store", method=method, log=False)
    trainer = AttributionTrainer(max_epochs=2, accelerator="cpu", callbacks=[callback], **run.QUIET, **settings)
    trainer.fit(recipe.module(), datamodule=made)
    proponents, _ = trainer.attribute(made).scores.topk(1)
    assert proponents.flatten().tolist() == list(range(6))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar2-dattri", "cifar10-trak", "maestro", "shakespeare"])
def test_the_full_model_trains_and_needs_no_fallback(name: str) -> None:
    module = SETTINGS[name].recipe.module()
    if name == "maestro":
        batch = stand_ins.melodies(2, 1, length=256)[0].tensors
    elif name == "shakespeare":
        batch = data.first(stand_ins.documentation(256)[0], 2).tensors
    else:
        batch = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    module.training_step(batch, 0).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    module.zero_grad()
    assert plan(module.eval(), batch, 2).fallback == ()


def test_the_page_lists_every_setting() -> None:
    page = (Path(run.__file__).parent / "README.md").read_text("utf-8")
    for name, setting in SETTINGS.items():
        parameters = sum(p.numel() for p in setting.recipe.module().parameters())
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` "))
        assert f"{parameters:,}" in row
        assert f"{setting.recipe.n_train:,}" in row


@pytest.mark.slow
def test_the_scores_predict_the_retrained_models(tmp_path: Path) -> None:
    """On digits and logistic regression the LDS is about 0.7: a wrong sign or order would show."""
    setting = SETTINGS["mnist-lr"]
    recipe = replace(setting.stand_in_recipe, n_train=300, n_targets=60, subsets=12, seeds=1)
    figures = run.measure(setting, recipe, setting.stand_in(), 0.0, tmp_path / "truth", "cpu")
    assert figures["lds"] > 0.5
