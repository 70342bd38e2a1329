"""Whether the table of methods shows what it has to: as fast and as good as the fastest and the best peer, and more."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

CLOSE = 1e-4  # explicit solution and conjugate gradients


class Target(NamedTuple):
    """The least that the best of our rows with such a method has to reach in a column."""

    network: str
    method: str
    column: str
    least: float


TARGETS = (
    Target("lr", r"^(?!Empirical|Datamodel)", "lds", 0.9),
    Target("mlp", r"^EK-FAC$", "lds", 0.52),
    Target("mlp", r"^IF CG$", "lds", 0.45),
    Target("mlp", r"one run", "lds", 0.68),
    Target("cnn", r"one run", "lds", 0.52),
    *(Target(network, r"^TRAK, one run", "auroc", 0.99) for network in ("lr", "mlp", "cnn")),
)


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where a method of ours is slower than its fastest peer, or worse than its best; then what was aimed at."""
    measured = [row for row in rows if "low" in row]
    return [*_beside_peers(measured), *_aims(measured), *_solutions(rows)]


def _beside_peers(measured: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in measured:
        peers = [peer for peer in measured if peer["by"] != "ours" and _same(peer) == _same(row)]
        if row["by"] != "ours" or not peers:
            continue
        fastest, best = min(peers, key=lambda peer: peer["seconds"]), max(peers, key=lambda peer: peer["lds"])
        name = f"{row['network']}: {row['method']}"
        if row["seconds"] > fastest["seconds"]:
            yield f"{name}: slower, {row['seconds'] / fastest['seconds']:.2f} times the seconds of {fastest['by']}"
        if row["high"] < best["lds"]:
            yield f"{name}: worse, LDS {row['lds']:.3f}, of {best['by']} {best['lds']:.3f}"


def _same(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["network"], row["method"], row["targets"]


def _aims(measured: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for network, method, column, least in TARGETS:
        own = [row for row in measured if row["by"] == "ours" and row["network"] == network and column in row]
        own = [row for row in own if re.search(method, row["method"])]
        if own:
            best = max(own, key=lambda row: row[column])
            verdict = "met" if best[column] >= least else "MISSED"
            yield f"{network}: {best['method']}: {column} {best[column]:.3f}, aim {least}: {verdict}"


def _solutions(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        if "difference" in row:
            verdict = "met" if row["difference"] <= CLOSE else "MISSED"
            yield f"{row['network']}: {row['method']}: {row['difference']:.1e}, aim {CLOSE:.0e}: {verdict}"
