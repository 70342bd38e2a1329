"""What the loggers are told of each snapshot, read back from the files that they wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.callbacks.statistics import self_influence_statistics
from lightning_attr.methods import TRAK

pytestmark = [
    # No test here needs validation data.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    # TensorBoard's own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*"),
]

ALWAYS = {"self_influence_mean", "self_influence_p95", "self_influence_top_decile_share"}
WITH_MASK = {"noisy_label_auroc", "noisy_label_recall@10%"}
N = 30


def fit(folder: Path, *loggers: Any, **own: Any) -> tuple[L.Trainer, list[tuple[int, Tensor]]]:
    """Train with loggers; returns the self-influence at each snapshot as well."""
    seen: list[tuple[int, Tensor]] = []
    callback = AttributionCallback(folder, TRAK(16), "all", **own)
    callback.listeners.append(
        lambda trainer, module, snapshot, values: seen.append((trainer.global_step, values.clone()))
    )
    settings = {"max_epochs": 3, "log_every_n_steps": 1, "callbacks": [callback]}
    trainer = quiet_trainer(L.Trainer, logger=list(loggers) or False, **settings)
    torch.manual_seed(0)
    trainer.fit(Logging(), loader_of(blobs(N), batch_size=6, shuffle=True))
    return trainer, seen


class Logging(BlobClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True)
        return loss


def expected(values: np.ndarray, previous: np.ndarray | None, mask: np.ndarray) -> dict[str, float]:
    """The same figures by other libraries."""
    order = np.argsort(-values)
    figures = {
        "self_influence_mean": values.mean(),
        "self_influence_p95": np.quantile(values, 0.95),
        "self_influence_top_decile_share": values[order[: N // 10]].sum() / values.sum(),
        "noisy_label_auroc": roc_auc_score(mask, values),
        "noisy_label_recall@10%": mask[order[: N // 10]].sum() / mask.sum(),
    }
    if previous is not None:
        figures["rank_stability"] = spearmanr(values, previous).statistic
    return {f"attribution/{name}": float(figure) for name, figure in figures.items()}


def read_csv(logger: CSVLogger) -> dict[int, dict[str, float]]:
    table = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    names = [name for name in table if name.startswith("attribution/")]
    rows = table.dropna(subset=names, how="all") if names else table[:0]
    return {int(row["step"]): row[names].dropna().to_dict() for _, row in rows.iterrows()}


def read_tensorboard(logger: TensorBoardLogger) -> dict[int, dict[str, float]]:
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    steps: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        if name.startswith("attribution/"):
            for event in events.Scalars(name):
                steps.setdefault(event.step, {})[name] = event.value
    return steps


def test_both_loggers_hold_the_figures(tmp_path: Path) -> None:
    mask = np.arange(N) % 7 == 0
    loggers = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")
    _, seen = fit(tmp_path / "store", *loggers, noise_mask=torch.from_numpy(mask))
    assert [step for step, _ in seen] == [5, 10, 15]
    values = [values.double().numpy() for _, values in seen]
    want = {
        step: expected(now, before, mask) for (step, _), now, before in zip(seen, values, [None, *values], strict=False)
    }
    for found in (read_csv(loggers[0]), read_tensorboard(loggers[1])):
        assert found.keys() == want.keys()
        for step in want:
            assert found[step] == pytest.approx(want[step], rel=1e-5)


@pytest.mark.parametrize("mask", [None, [False] * N, [True] * N])
def test_without_noise_of_both_kinds(tmp_path: Path, mask: Any) -> None:
    logger = CSVLogger(tmp_path / "csv")
    fit(tmp_path / "store", logger, noise_mask=mask)
    names = [{name.removeprefix("attribution/") for name in figures} for figures in read_csv(logger).values()]
    assert names == [ALWAYS, ALWAYS | {"rank_stability"}, ALWAYS | {"rank_stability"}]


@pytest.mark.parametrize("own", [{"log": False}, {"featurize": False}])
def test_nothing_is_logged(tmp_path: Path, own: dict[str, Any]) -> None:
    loggers = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")
    fit(tmp_path / "store", *loggers, **own)
    assert read_csv(loggers[0]) == read_tensorboard(loggers[1]) == {}
    assert "loss" in pd.read_csv(Path(loggers[0].log_dir) / "metrics.csv")


def test_the_trainers_own_metrics_are_left_alone(tmp_path: Path) -> None:
    metrics, rows = [], []
    for log in (True, False):
        logger = CSVLogger(tmp_path / f"csv-{log}")
        trainer, _ = fit(tmp_path / f"store-{log}", logger, log=log)
        metrics.append([trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics])
        table = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
        rows.append(table[["step", "epoch", "loss"]].dropna().reset_index(drop=True))
    assert metrics[0] == metrics[1]
    pd.testing.assert_frame_equal(rows[0], rows[1], check_dtype=False)  # a column without gaps reads as integers
    assert not any(name.startswith("attribution/") for part in metrics[0] for name in part)


def test_statistics_of_signed_values() -> None:
    """Regression has self-influence of both signs: the share of the top decile stays one, in [0, 1]."""
    statistics = self_influence_statistics(torch.tensor([-4.0, 1.0, 1.0, 2.0]))
    assert statistics["attribution/self_influence_top_decile_share"] == 0.5
    assert statistics["attribution/self_influence_mean"] == 0.0
