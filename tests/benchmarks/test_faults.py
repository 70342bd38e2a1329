"""Damages, hostile directories and kills of faults.py: none silent, none raw, none that leads out, none lost."""

from __future__ import annotations

import argparse
from typing import Any

import faults
import faults_crafted
import faults_damages
import faults_hostile
import faults_kills
import faults_processes
import pytest


def total(rows: list[dict[str, Any]], name: str) -> int:
    return sum(row[name] for row in rows)


KINDS = ("merged", "result", "top", "truth")  # those that are made quickly


@pytest.mark.parametrize(("damages", "kinds"), [(60, KINDS), pytest.param(1000, None, marks=pytest.mark.slow)])
def test_no_damage_is_silent_or_raw(damages: int, kinds: tuple[str, ...] | None) -> None:
    rows = faults_damages.rows(argparse.Namespace(seed=3, damages=damages, kinds=kinds))
    assert total(rows, "tried") > 0.9 * damages
    assert (total(rows, "raw"), total(rows, "silent")) == (0, 0)
    print(faults.table(rows))


def test_every_hostile_directory_is_contained() -> None:
    rows = faults_hostile.rows(argparse.Namespace())
    assert total(rows, "tried") == total(rows, "contained") == len(faults_hostile.CRAFTED) > 20


@pytest.mark.slow
def test_no_kill_loses_anything() -> None:
    rows = faults_kills.rows(argparse.Namespace(seed=1, kills=3))
    assert total(rows, "lost") == 0


QUICK = ("making a folder", "leaving training alone")
PHASES = [
    pytest.param(number, id=f"{phase.run}, {phase.what}", marks=[] if phase.what in QUICK else pytest.mark.slow)
    for number, phase in enumerate(faults_processes.PHASES)
]


@pytest.mark.parametrize("number", PHASES)
def test_where_one_rank_fails_none_waits_for_it(number: int) -> None:
    tried, as_it_must, waiting = faults_processes.failing(number)
    assert (as_it_must, waiting) == (tried, 0)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_every_method_on_more_processes_than_shards(count: int) -> None:
    (row,) = faults_processes.methods((count,))
    assert row["equal"] == row["tried"] == len(faults_processes.METHODS)


def test_every_table_is_found() -> None:
    tables = ("arguments", "crafted", "damages", "hostile", "kills", "processes")
    assert {f"faults_{table}" for table in tables} <= set(faults.parts())
    assert "faults_subject" not in faults.parts()


@pytest.mark.parametrize(("number", "kinds"), [(40, ("top", "truth")), pytest.param(300, None, marks=pytest.mark.slow)])
def test_what_a_stranger_wrote_is_named_or_usable(number: int, kinds: tuple[str, ...] | None) -> None:
    rows = faults_crafted.rows(argparse.Namespace(seed=0, damages=number, kinds=kinds))
    assert total(rows, "tried") == number
    assert total(rows, "raw") == 0
    assert total(rows, "named") > 0
