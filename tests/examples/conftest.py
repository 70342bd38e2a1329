"""The benchmark settings are scripts: their folder is where they find each other."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"

if FOLDER.is_dir():
    sys.path += [str(FOLDER), str(FOLDER.parent)]
else:  # against an installed wheel, far from the repository
    collect_ignore_glob = ["test_*.py"]
