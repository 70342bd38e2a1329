"""Damages, hostile directories and kills of faults.py: none silent, none raw, none that leads out, none lost."""

from __future__ import annotations

import argparse
from typing import Any

import faults
import faults_damages
import faults_hostile
import faults_kills
import pytest


def total(rows: list[dict[str, Any]], name: str) -> int:
    return sum(row[name] for row in rows)


@pytest.mark.parametrize("damages", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_damage_is_silent_or_raw(damages: int) -> None:
    rows = faults_damages.rows(argparse.Namespace(seed=3, damages=damages))
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


def test_every_table_is_found() -> None:
    assert {"faults_arguments", "faults_damages", "faults_hostile", "faults_kills"} <= set(faults.parts())
    assert "faults_subject" not in faults.parts()
