"""DataFrames, with and without pandas."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from lightning_attr.errors import MissingDependencyError
from lightning_attr.results.frames import data_frame


def test_rows_and_columns_have_their_labels() -> None:
    pytest.importorskip("pandas")
    values = np.arange(6.0).reshape(2, 3)
    frame = data_frame(values, ("row", [7, 5]), ("column", [2, 1, 0]))
    assert frame.loc[5, 2] == 3.0
    assert (frame.index.name, frame.columns.name) == ("row", "column")
    assert np.shares_memory(frame.to_numpy(), values)


def test_columns_by_name() -> None:
    pytest.importorskip("pandas")
    frame = data_frame({"a": np.array([1, 2]), "b": np.array([0.5, 1.5])}, ("row", [7, 5]))
    assert frame["b"].to_dict() == {7: 0.5, 5: 1.5}
    assert list(frame.columns) == ["a", "b"]
    assert frame["a"].dtype == np.int64


def test_missing_pandas_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "lightning_attr\[pandas\]"'):
        data_frame(np.eye(2), ("row", [0, 1]))
