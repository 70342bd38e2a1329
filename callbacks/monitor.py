"""Shows attribution while a run trains: the most suspicious samples as a table and as a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor
from typing_extensions import override

from lightning_attr.arguments.checks import check_flag, check_int
from lightning_attr.batches.nested import float_tensors
from lightning_attr.callbacks.attribution import AttributionCallback
from lightning_attr.callbacks.featurizing import scores_at
from lightning_attr.callbacks.listening import recorder_of
from lightning_attr.data.sample_errors import read_sample
from lightning_attr.files.io import write_bytes
from lightning_attr.methods import AttributionMethod
from lightning_attr.metrics import figures, plotting
from lightning_attr.results.result import AttributionResult
from lightning_attr.results.score_matrix import ScoreMatrix
from lightning_attr.store.manifest import Snapshot
from lightning_attr.user_code.lightning_names import AnyCallback, both

_TABLE = "attribution/suspicious_samples"
_FIGURE = "attribution/top_influence"


class AttributionMonitor(AnyCallback):
    """Logs the training samples of highest self-influence at every snapshot: the likely mislabelled ones.

    It reads what :class:`AttributionCallback` computes, in whichever order the two are listed. The table goes to every
    logger of the Trainer: as text to TensorBoard, as a table where the logger has ``log_table`` (Weights & Biases), and
    as a CSV file beside the metrics otherwise. The figure shows the samples themselves if they are images, and else the
    distribution of self-influence.

    Args:
        k: how many samples.
        figure: draw the figure, which needs matplotlib.
        report: write the page of :meth:`lightning_attr.AttributionResult.report` at every snapshot, beside the metrics
            as ``attribution/report-<snapshot>.html``: all training samples, and behind the ``k`` most suspicious their
            proponents and opponents at this snapshot.

    Raises:
        ValueError: if ``k`` is not a positive integer, or a report is wanted of a method whose targets have features of
            their own, such as LESS.

    Example:
        >>> from lightning_attr.callbacks import AttributionCallback
        >>> callbacks = [AttributionCallback("attribution"), AttributionMonitor(k=8)]
    """

    reads_features = True
    """So that :meth:`AttributionCallback.check` knows that features are wanted while training."""

    def __init__(self, k: int = 12, figure: bool = True, report: bool = False) -> None:
        self.k = check_int(self, "k", k, minimum=1)
        self.figure = check_flag(self, "figure", figure)
        self.report = check_flag(self, "report", report)
        self._recorder: AttributionCallback | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the callback that computes the features."""
        if stage != "fit":
            return
        recorder = recorder_of(trainer, "AttributionMonitor shows", "AttributionMonitor()")
        if self.figure:
            figures.new_figure()  # without matplotlib fail here, not after the first epoch
        if self.report and type(recorder.method).bind_targets is not AttributionMethod.bind_targets:
            raise ValueError(
                "Expected a method whose features of targets are those of training samples for "
                f"AttributionMonitor(report=True), but {type(recorder.method).__name__} has others. Write the report "
                "after training: `trainer.attribute(...).report(path)`."
            )
        self._recorder = recorder
        if self._show not in recorder.listeners:
            recorder.listeners.append(self._show)

    def _show(
        self, trainer: L.Trainer, pl_module: L.LightningModule, snapshot: Snapshot, self_influence: Tensor
    ) -> None:
        top = self_influence.topk(min(self.k, len(self_influence))).indices.tolist()
        rows = self._table(snapshot, self_influence, top)
        for logger in trainer.loggers:
            _log_table(logger, list(rows[0]), [list(row.values()) for row in rows], snapshot)
            if self.figure:
                _log_figure(logger, self._figure(self_influence, top, rows), snapshot)
        if self.report:
            folder = Path(trainer.log_dir or trainer.default_root_dir) / "attribution"
            folder.mkdir(parents=True, exist_ok=True)
            self._write_report(folder / f"report-{snapshot.key}.html", snapshot, self_influence, top)

    def _write_report(self, path: Path, snapshot: Snapshot, self_influence: Tensor, top: Sequence[int]) -> None:
        recorder = self._recorder
        assert recorder is not None  # set before any snapshot
        store, key = recorder.store, snapshot.key
        scores = scores_at(store, snapshot, recorder.method, recorder.layers, top)
        labels = store.column(key, "label") if "label" in store.shard(key, 0) else None
        provenance = {**recorder.method.config, "snapshots": [key]}
        result = AttributionResult(
            ScoreMatrix(scores, target_indices=torch.tensor(top), provenance=provenance),
            self_influence,
            loss=store.column(key, "loss").float(),
            labels=labels,
            noise_mask=recorder.noise_mask,
        )
        data = recorder.source.dataset
        result.report(path, train=data, targets=data, title=f"Suspicious training samples at {key}")

    def _table(self, snapshot: Snapshot, self_influence: Tensor, top: Sequence[int]) -> list[dict[str, Any]]:
        """One row a sample: its index, self-influence and loss, and its label and whether it is flipped where known."""
        assert self._recorder is not None  # set before any snapshot
        store, mask = self._recorder.store, self._recorder.noise_mask
        known: dict[str, Tensor] = {"self_influence": self_influence, "loss": store.column(snapshot.key, "loss")}
        if "label" in store.shard(snapshot.key, 0):
            known["label"] = store.column(snapshot.key, "label")
        if mask is not None:
            known["flipped"] = mask
        return [
            {"rank": rank, "index": i, **{name: values[i].item() for name, values in known.items()}}
            for rank, i in enumerate(top, start=1)
        ]

    def _figure(self, self_influence: Tensor, top: Sequence[int], rows: Sequence[dict[str, Any]]) -> Any:
        assert self._recorder is not None
        images = [_image(read_sample(self._recorder.source.dataset, i)) for i in top]
        if any(image is None for image in images):
            return plotting.plot_self_influence(self_influence, self._recorder.noise_mask)[0]
        labels = [f": “{row['label']}”" if "label" in row else "" for row in rows]
        captions = [
            f"#{row['index']}{label}\n{row['self_influence']:.2g}" for row, label in zip(rows, labels, strict=True)
        ]
        cells = [(image, caption) for image, caption in zip(images, captions, strict=True) if image is not None]
        return plotting.plot_samples(cells)[0]


def _image(sample: Any) -> Tensor | None:
    """Find the image of a sample: its first float tensor, if that has the shape of one."""
    tensors = float_tensors(sample)
    if not tensors or min(tensors[0].shape, default=0) < 1:
        return None
    shape = tensors[0].shape
    channels_first = len(shape) == 3 and shape[0] in {1, 3} and min(shape[1:]) > 3
    return tensors[0] if channels_first or (len(shape) == 2 and min(shape) > 3) else None


def _log_table(logger: Logger, columns: list[str], rows: list[list[Any]], snapshot: Snapshot) -> None:
    if isinstance(logger, both(TensorBoardLogger)):
        logger.experiment.add_text(_TABLE, _markdown(columns, rows), snapshot.global_step)
    elif hasattr(logger, "log_table"):
        logger.log_table(key=_TABLE, columns=columns, data=rows, step=snapshot.global_step)
    else:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerows([columns, *rows])
        _beside_metrics(logger, _TABLE, snapshot, "csv", lambda: text.getvalue().encode())


def _log_figure(logger: Logger, figure: Any, snapshot: Snapshot) -> None:
    if isinstance(logger, both(TensorBoardLogger)):
        logger.experiment.add_figure(_FIGURE, figure, snapshot.global_step)
    elif hasattr(logger, "log_image"):
        logger.log_image(key=_FIGURE, images=[figure], step=snapshot.global_step)
    else:
        _beside_metrics(logger, _FIGURE, snapshot, "png", lambda: _png(figure))


def _beside_metrics(logger: Logger, name: str, snapshot: Snapshot, suffix: str, content: Callable[[], bytes]) -> None:
    """Write a file into the logger's directory; a logger without one has no place for it."""
    folder = getattr(logger, "log_dir", None) or logger.save_dir
    if folder is not None:
        write_bytes(Path(folder) / f"{name}-{snapshot.key}.{suffix}", content())


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *(line(row) for row in rows)])
