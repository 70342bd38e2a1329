"""Tables for pandas, which is optional."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_attr.errors import MissingDependencyError

if TYPE_CHECKING:
    import pandas as pd


def data_frame(data: Any, index: tuple[str, Any], columns: tuple[str, Any] | None = None) -> pd.DataFrame:
    """Make a DataFrame.

    Shapes: data (rows, columns).
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingDependencyError(
            'DataFrames need pandas, which is not installed. Run `pip install "lightning_attr[pandas]"`.'
        ) from error
    rows, labels = (None if axis is None else pd.Index(axis[1], name=axis[0]) for axis in (index, columns))
    return pd.DataFrame(data, index=rows, columns=labels, copy=False)
