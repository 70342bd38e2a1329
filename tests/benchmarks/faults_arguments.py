"""Wrong calls of everything public: each says which argument is wrong."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from typing import Any

from wrong_calls import wrong_calls

__all__ = ["rows"]

OUTCOMES = ("named", "raw", "accepted")


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Make every wrong call of the tests, and count what came of them by what was called."""
    counts = defaultdict[str, Counter[str]](Counter)
    for call in wrong_calls():
        verdict, message = call.verdict()
        what = "attribute" if call.owner == "attribute" else "classes" if call.owner[0].isupper() else "functions"
        counts[what][verdict] += 1
        if verdict != "named":
            print(f"{verdict}: {call}: {message}")
    return [
        {"table": "wrong calls", "what": what, "tried": sum(own.values()), **{name: own[name] for name in OUTCOMES}}
        for what, own in sorted(counts.items())
    ]
