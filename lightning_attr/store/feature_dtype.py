r"""How a shard keeps features on disk: float16 with one scale, bfloat16, or float32.

The scale of a shard is a power of two, so that multiplying by it is exact: the shard's largest magnitude :math:`x`
becomes one in [16384, 32768), under the largest float16, 65504. A feature :math:`y` comes back as

=========================================  =====================================
:math:`|y| \ge 2^{-28} x`                  with float16's 11 binary digits
:math:`2^{-28} x > |y| \ge 2^{-38} x`      with fewer, to :math:`\pm 2^{-39} x`
below                                      perhaps as 0
=========================================  =====================================

Second directions (see :mod:`lightning_attr.features.second_direction`) are stored likewise, those rows alone that have
any: rows below :math:`2^{-24} x` count as zero there, for their squares are added up with that of :math:`x`.

No row of the features is lost: a shard with a row whose own largest magnitude is below :math:`2^{-28} x` (or which does
not fit for any other reason) is kept in float32, so that every feature is right to :math:`2^{-11}` (bfloat16:
:math:`2^{-8}`) of the largest one in its row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_choice

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SCALE = "features_scale"
"""Name of the column that float16 features are multiplied by."""
SECOND, SECOND_ROWS = "second_features", "second_rows"
"""Names of the columns of second directions, and of their rows in a file."""
_FEATURES = frozenset({"features", SECOND})
_NOT_BY_ROW = frozenset({SCALE, f"{SECOND}_scale", SECOND_ROWS})
_SMALLEST = 2.0**-24
"""Of the largest second direction: smaller ones count as zero."""
_LARGEST = 15
"""Features of float16 are scaled to below two to this power."""
_LARGEST_SCALE = 2.0 ** (128 - _LARGEST)
"""That of the largest numbers of float32."""


def check_feature_dtype(feature_dtype: str, owner: object = "FeatureStore") -> None:
    """Check the name of a dtype for features."""
    check_choice(owner, "feature_dtype", feature_dtype, _DTYPES)


def check_columns(columns: Mapping[str, Tensor], rows: range) -> None:
    """Check what is to be stored.

    Shapes: columns (rows, ...).
    """
    for name, values in columns.items():
        if len(values) != len(rows):
            raise ValueError(
                f"Expected column {name!r} to have the {len(rows)} rows {rows[0]} to {rows[-1]} of its shard, but got "
                f"{len(values)}."
            )
        finite = _magnitudes(values).isfinite()
        if not finite.all():
            raise ValueError(
                f"Expected finite values in column {name!r}, but row {rows[int(finite.int().argmin())]} holds NaN or "
                "Inf: look at that sample, and at the training; a diverged model has no attribution."
            )


def encode(columns: Mapping[str, Tensor], feature_dtype: str) -> dict[str, Tensor]:
    """Bring the columns of a shard into the form that is stored.

    Shapes: columns (rows, ...). Returns the columns; with float16 a column ``features_scale`` ``(1,)``, float32, more:
    the features are ``features * features_scale``.
    """
    stored, dtype = dict(columns), _DTYPES[feature_dtype]
    if SECOND in stored:
        magnitudes = _magnitudes(stored[SECOND])
        kept = (magnitudes > _SMALLEST * magnitudes.max()).nonzero().flatten()
        stored |= {SECOND: stored[SECOND][kept].contiguous(), SECOND_ROWS: kept}
    for name in _FEATURES & stored.keys():
        stored |= _encoded(name, stored[name], dtype)
    return stored


def _encoded(name: str, features: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The column of features as it is stored, and its scale if it has one."""
    if _stored_dtype(name, features, dtype) == features.dtype:
        return {name: features}
    magnitudes = _magnitudes(features)
    scale = 1.0
    if dtype == torch.float16 and magnitudes.any():
        scale = 2.0 ** (int(torch.frexp(magnitudes.max()).exponent) - _LARGEST)
    scaled = magnitudes[magnitudes > 0] / scale
    lost = (scaled < torch.finfo(dtype).tiny).any()
    overflow = not scaled.to(dtype).isfinite().all()  # the largest float32 values round up to a bfloat16 Inf
    if lost or overflow or scale < torch.finfo(torch.float32).tiny:
        return {name: features}
    scales = {f"{name}_scale": torch.tensor([scale])} if dtype == torch.float16 else {}
    return {name: (features / scale).to(dtype), **scales}


def decode(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`encode`.

    Returns column name -> values, with ``features`` in float32 (float64 if they are stored so).
    """
    decoded = {name: values for name, values in columns.items() if name not in _NOT_BY_ROW}
    for name in _FEATURES & columns.keys():
        decoded[name] = decode_features(columns, name)
    if SECOND in decoded:
        rows = next(len(values) for name, values in decoded.items() if name != SECOND)
        few = decoded[SECOND]
        decoded[SECOND] = few.new_zeros(rows, *few.shape[1:]).index_copy_(0, columns[SECOND_ROWS], few)
    return decoded


def decode_features(columns: Mapping[str, Tensor], name: str = "features") -> Tensor:
    """Give the features alone.

    Returns ``(rows, dim)``, float32 (float64 if they are stored so).
    """
    features, scale = columns[name], f"{name}_scale"
    if features.dtype not in {torch.float16, torch.bfloat16}:
        return features
    features = features.float()
    return features.mul_(columns[scale]) if scale in columns else features


def by_row(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take those of a file's columns that have a value for each row.

    Example:
        >>> list(by_row({"features": torch.ones(1, 2).half(), "features_scale": torch.tensor([0.5])}))
        ['features']
    """
    return {name: values for name, values in columns.items() if name not in {*_NOT_BY_ROW, SECOND}}


def senseless(columns: Mapping[str, Tensor]) -> str | None:
    """Say what in a file's columns nobody can have written, whatever their checksum says.

    Example:
        >>> senseless({"features": torch.ones(1, 2), "loss": torch.tensor([torch.nan])})
        '`loss` holds NaN or Inf'
    """
    for name, values in sorted(columns.items()):
        if name == SECOND_ROWS:
            fits = values.dtype == torch.int64
        elif name in _NOT_BY_ROW:
            fits = values.dtype.is_floating_point and values.shape == (1,) and name.removesuffix("_scale") in columns
            if fits and not 0 < values.item() <= _LARGEST_SCALE:
                return f"`{name}` is {values.item()}"
        else:
            fits = values.dtype.is_floating_point if name in _FEATURES else not values.dtype.is_complex
        if not fits or values.ndim == 0:
            return f"`{name[:80]}` has the shape {tuple(values.shape)} and the dtype {values.dtype}"
        # NaN and Inf show in a sum, which is quicker; one that overflows does not tell.
        if not values.sum(dtype=torch.float64).isfinite() and not values.isfinite().all():
            return f"`{name[:80]}` holds NaN or Inf"
    few, rows = columns.get(SECOND), columns.get(SECOND_ROWS)
    if few is None and rows is None:
        return None
    fits = few is not None and rows is not None and few.ndim == 3 and rows.shape == few.shape[:1]
    total = max((len(values) for values in by_row(columns).values()), default=0)
    inside = fits and rows is not None and bool(((rows >= 0) & (rows < total)).all())
    return None if inside else f"`{SECOND}` and `{SECOND_ROWS}` do not fit together"


def row_bytes(columns: Mapping[str, Tensor], feature_dtype: str) -> int:
    """Tell how many bytes a row takes on disk."""
    dtype = _DTYPES[feature_dtype]
    return sum(values[0].numel() * _stored_dtype(name, values, dtype).itemsize for name, values in columns.items())


def _magnitudes(values: Tensor) -> Tensor:
    """The largest magnitude of each row ``(rows,)``, NaN if one is NaN; many times faster than looking at every one."""
    flat = values.flatten(1) if values.ndim > 1 else values[:, None]
    return flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(len(flat))


def _stored_dtype(name: str, values: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if name in _FEATURES and values.dtype == torch.float32 else values.dtype
