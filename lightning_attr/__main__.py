"""The command ``lightning-attr``: what can be done with stores and results without a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from lightning_attr.errors import AttributionError
from lightning_attr.results.result import AttributionResult
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.inspection import damages, described


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns 0, or 1 if something is wrong, which is said on the error stream.
    """
    read = _parser().parse_args(arguments)
    act: Callable[[argparse.Namespace], int] = read.act
    try:
        return act(read)
    except (AttributionError, ValueError, OSError) as error:
        print(f"lightning-attr {read.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-attr", description="Look at attribution stores and results.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, act: Callable[[argparse.Namespace], int], what: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=what, description=what)
        own.set_defaults(act=act)
        return own

    command("show", _show, "say what is in a store").add_argument("store")
    command("verify", _verify, "read every file of a store and compare it with its digest").add_argument("store")
    repair = command("repair", _repair, "drop damaged features, which `trainer.attribute` computes again")
    repair.add_argument("store")
    merge = command("merge", _merge, "join the stores of several runs into one ensemble")
    merge.add_argument("stores", nargs="+")
    merge.add_argument("--output", required=True, help="a new directory")
    report = command("report", _report, "write a saved result as a page for a browser")
    report.add_argument("result", help="a directory that `result.save` wrote")
    report.add_argument("--output", default="report.html", help="default: %(default)s")
    report.add_argument("--k", type=int, default=5, help="proponents and opponents per target (default: %(default)s)")
    report.add_argument("--title", default="Training-data attribution", help="default: %(default)s")
    return parser


def _show(read: argparse.Namespace) -> int:
    print(described(FeatureStore.open(read.store, writer=False)))
    return 0


def _verify(read: argparse.Namespace) -> int:
    found = damages(FeatureStore.open(read.store, writer=False))
    for damage in found:
        print(damage, file=sys.stderr)
    print(f"{read.store}: " + (f"{len(found)} damaged files" if found else "every file is whole"))
    return 1 if found else 0


def _repair(read: argparse.Namespace) -> int:
    dropped = FeatureStore.open(read.store).repair()
    for path in dropped:
        print(f"dropped {path}")
    print(f"{read.store}: {len(dropped)} files dropped")
    return 0


def _merge(read: argparse.Namespace) -> int:
    merged = FeatureStore.merge(read.stores, read.output)
    print(f"{read.output}: {len(merged.snapshots)} snapshots of {len(read.stores)} stores")
    return 0


def _report(read: argparse.Namespace) -> int:
    path = AttributionResult.load(read.result).report(read.output, k=read.k, title=read.title)
    print(f"{path}: numbers alone; `result.report(path, train=..., targets=...)` in Python shows the samples as well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
