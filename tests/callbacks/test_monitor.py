"""The monitor: what it writes is read back from the loggers' files."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.data import TensorDataset

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback, AttributionMonitor
from lightning_attr.callbacks.featurizing import scores_at
from lightning_attr.errors import MissingDependencyError
from lightning_attr.methods import LESS, TRAK, GradDot
from lightning_attr.projectors import KroneckerProjector

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*"),  # tensorboard's own use of numpy
]


class TableLogger(Logger):
    """Has `log_table` and `log_image`, as the Weights & Biases logger does."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []

    name = version = "table"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_table(self, **table: Any) -> None:
        self.tables.append(table)

    def log_image(self, **image: Any) -> None:
        self.images.append(image)


def fit(tmp_path: Path, logger: Any, data: Any = None, order: int = 1, **settings: Any) -> AttributionCallback:
    recorder = AttributionCallback(tmp_path / "store", **settings)
    callbacks = [recorder, AttributionMonitor(k=3)][::order]
    quiet_trainer(max_epochs=2, logger=logger, callbacks=callbacks).fit(
        BlobClassifier(), loader_of(data or blobs(16), shuffle=True)
    )
    return recorder


@pytest.mark.parametrize("order", [1, -1])
def test_csv_table_holds_the_most_suspicious_samples(tmp_path: Path, order: int) -> None:
    mask = torch.arange(16) % 4 == 0
    recorder = fit(tmp_path, CSVLogger(tmp_path, version=0), order=order, noise_mask=mask)
    folder = tmp_path / "lightning_logs" / "version_0" / "attribution"
    keys = [snapshot.key for snapshot in recorder.store.snapshots]
    assert len(keys) == 2
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        f"{name}-{key}.{suffix}"
        for key in keys
        for name, suffix in (("suspicious_samples", "csv"), ("top_influence", "png"))
    )
    rows = list(csv.DictReader((folder / f"suspicious_samples-{keys[-1]}.csv").read_text().splitlines()))
    values, top = recorder.self_influence.topk(3)
    loss, label = (recorder.store.column(keys[-1], name) for name in ("loss", "label"))
    assert [int(row["index"]) for row in rows] == top.tolist()
    for row, i, value in zip(rows, top.tolist(), values.tolist(), strict=True):
        assert float(row["self_influence"]) == pytest.approx(value)
        assert float(row["loss"]) == pytest.approx(loss[i].item())
        assert int(row["label"]) == label[i].item()
        assert row["flipped"] == str(mask[i].item())


def test_tensorboard_gets_text_and_figure(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, version=0)
    recorder = fit(tmp_path, logger)
    events = event_accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    text = events.Tensors("attribution/suspicious_samples/text_summary")
    figures = events.Images("attribution/top_influence")
    steps = [snapshot.global_step for snapshot in recorder.store.snapshots]
    assert [event.step for event in text] == [event.step for event in figures] == steps
    table = text[-1].tensor_proto.string_val[0].decode()
    assert table.splitlines()[0] == "| rank | index | self_influence | loss | label |"
    assert table.splitlines()[2].startswith(f"| 1 | {recorder.self_influence.argmax()} |")


def test_logger_with_tables_gets_a_table(tmp_path: Path) -> None:
    logger = TableLogger()
    recorder = fit(tmp_path, logger)
    assert [table["step"] for table in logger.tables] == [s.global_step for s in recorder.store.snapshots]
    assert logger.tables[-1]["columns"] == ["rank", "index", "self_influence", "loss", "label"]
    assert logger.tables[-1]["data"][0][1] == recorder.self_influence.argmax()
    assert len(logger.images) == 2


def test_images_are_shown_and_other_data_as_a_distribution(tmp_path: Path) -> None:
    class Flat(BlobClassifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(1))

    images = TensorDataset(torch.rand(16, 1, 8, 8), torch.arange(16) % 3)
    shown = TableLogger()
    callbacks = [recorder := AttributionCallback(tmp_path / "images"), AttributionMonitor(k=4)]
    quiet_trainer(max_epochs=1, logger=shown, callbacks=callbacks).fit(Flat(size=64), loader_of(images))
    captions = [ax.get_xlabel() for ax in shown.images[-1]["images"][0].axes[:4]]
    top = recorder.self_influence.topk(4)
    assert captions == [
        f"#{i}: “{i % 3}”\n{value:.2g}" for i, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]

    other = TableLogger()
    fit(tmp_path / "blobs", other)
    assert "self-influence" in other.images[-1]["images"][0].axes[0].get_xlabel()


def test_training_is_untouched(tmp_path: Path) -> None:
    def weights(callbacks: list[L.Callback]) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = BlobClassifier()
        quiet_trainer(max_epochs=3, callbacks=callbacks, logger=CSVLogger(tmp_path)).fit(
            model, loader_of(blobs(16), shuffle=True)
        )
        return [p.detach().clone() for p in model.parameters()] + [torch.get_rng_state()]

    with_monitor = weights([AttributionCallback(tmp_path / "store"), AttributionMonitor()])
    assert all(torch.equal(a, b) for a, b in zip(weights([]), with_monitor, strict=True))


@pytest.mark.parametrize("callbacks", [[], [AttributionCallback("x", featurize=False)]])
def test_needs_a_callback_that_featurizes(callbacks: list[L.Callback]) -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[*callbacks, AttributionMonitor()])
    with pytest.raises(
        ValueError, match=r"Expected an AttributionCallback that featurizes .* but found (none|one with)"
    ):
        trainer.fit(BlobClassifier(), loader_of(blobs(8)))


def test_without_matplotlib_it_says_which_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "lightning_attr\[plot\]"'):
        fit(tmp_path, CSVLogger(tmp_path))


@pytest.mark.parametrize("method", [TRAK(projector=KroneckerProjector(16)), GradDot(projector=KroneckerProjector(16))])
def test_the_page_of_a_report_is_written_while_training(tmp_path: Path, method: Any) -> None:
    recorder = AttributionCallback(tmp_path / "store", method, feature_dtype="float32")
    monitor = AttributionMonitor(k=3, figure=False, report=True)
    trainer = quiet_trainer(max_epochs=2, default_root_dir=tmp_path, callbacks=[recorder, monitor])
    data = blobs(16)
    trainer.fit(BlobClassifier(), loader_of(data, shuffle=True))
    pages = sorted((tmp_path / "attribution").glob("report-*.html"))
    assert [page.name for page in pages] == [f"report-{s.key}.html" for s in recorder.store.snapshots]
    assert "Suspicious training samples at epoch=0001" in pages[-1].read_text("utf-8")
    top = recorder.self_influence.topk(3).indices.tolist()
    last = recorder.store.snapshots[-1]
    shown = scores_at(recorder.store, last, recorder.method, recorder.layers, top)
    recorder.store.set_aside([recorder.store.snapshots[0].key])
    by_attribute = trainer.attribute(targets="train").scores.values
    torch.testing.assert_close(shown, by_attribute[:, top], rtol=1e-3, atol=1e-6)


def test_a_report_of_other_target_features_is_refused(tmp_path: Path) -> None:
    callbacks = [AttributionCallback(tmp_path, LESS()), AttributionMonitor(figure=False, report=True)]
    with pytest.raises(ValueError, match=r"AttributionMonitor\(report=True\), but LESS has others"):
        quiet_trainer(max_epochs=1, callbacks=callbacks).fit(BlobClassifier(), loader_of(blobs(8)))


def test_k_must_be_positive() -> None:
    with pytest.raises(ValueError, match="`k` of AttributionMonitor to be an integer >= 1, but got 0"):
        AttributionMonitor(k=0)
