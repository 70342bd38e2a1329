"""What stored files, hostile directories and kills can do: a table of faults tried, and of what came of them.

    python tests/benchmarks/faults.py [--seed 0] [--damages 300] [--kills 2] [--json FILE]

Each table comes from a file ``faults_*.py`` beside this one, with a function ``rows(options)``: plain values by column,
``table`` and ``what`` among them; another file is another table.

- damages: random flips, truncations, deletions, swaps and edits of every kind of file. "named" is an error of this
  package that names the file or its directory; "harmless" is a reading that is equal in every bit to that of the whole
  files (a cache that is computed again, a retraining that is repeated, figures that nothing reads); "raw" is any other
  error, "silent" any other reading.
- crafted: records and tensors that a stranger changed, with right checksums. "named" is an error of this package,
  "usable" a directory with which all went well; "raw" is any other error.
- hostile: directories that a stranger crafted to be read, written, deleted or copied outside of them. "contained" means
  that nothing outside changed or was read, and that no raw error came.
- wrong calls: every public argument with values that cannot be right, of the tests. "named" is an error of this package
  that names the argument; "raw" is any other error, "accepted" none.
- processes: every method on several processes with one shard of rows, beside one process; and a rank that fails in each
  phase of attribution and training. "waiting" counts processes that had to be ended.
- kills: runs ended by SIGKILL at a random moment, then started again. "lost" counts stores that differ in any bit from
  that of a run that was not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

__all__ = ["parts", "table"]

HERE = Path(__file__).parent


def parts() -> list[str]:
    """Modules that give tables."""
    names = sorted(file.stem for file in HERE.glob("faults_*.py"))
    return [name for name in names if "def rows(" in (HERE / f"{name}.py").read_text("utf-8")]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of one table as text, with their sum."""
    columns = [name for name in rows[0] if name not in {"table", "what"}]
    total = {"what": "all", **{name: sum(row[name] for row in rows) for name in columns}}
    width = max(len(row["what"]) for row in [*rows, total])
    lines = [rows[0]["table"].ljust(width) + "".join(f"{name:>11}" for name in columns)]
    lines += [row["what"].ljust(width) + "".join(f"{row[name]:>11}" for name in columns) for row in [*rows, total]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--damages", type=int, default=300, help="damages tried")
    parser.add_argument("--kills", type=int, default=2, help="runs killed")
    parser.add_argument("--only", help="one part, such as faults_damages")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = []
    for name in [options.only] if options.only else parts():
        begin = time.perf_counter()
        rows = importlib.import_module(name).rows(options)
        found += rows
        for one in dict.fromkeys(row["table"] for row in rows):
            print(f"\n{table([row for row in rows if row['table'] == one])}")
        print(f"({time.perf_counter() - begin:.0f} s)", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "rows": found}, indent=1))


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    main()
