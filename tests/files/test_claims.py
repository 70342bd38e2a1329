"""Claims of live, dead, remote and restarted processes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lightning_attr.files import claims as module
from lightning_attr.files.claims import Claims, create_once


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(tmp_path / "claims")


def files(claims: Claims) -> list[str]:
    return sorted(file.name for file in claims.folder.iterdir() if not file.name.startswith("."))


def plant(claims: Claims, name: str, age: float = 0, **owner: Any) -> Path:
    path = claims.folder / name
    path.write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "process": "other", "time": 0, **owner}))
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    return path


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_one_has_it_until_it_is_given_back(claims: Claims) -> None:
    claim = claims.take("a")
    assert claim is not None
    assert claims.take("a") is None
    assert claims.take("b") is not None
    with claim:
        pass
    assert files(claims) == ["b.0"]
    assert claims.take("a") is not None


def test_names_that_begin_alike_are_different(claims: Claims) -> None:
    assert claims.take("subset=1-repeat=10") is not None
    assert claims.take("subset=1-repeat=1") is not None
    assert claims.take("subset=11-repeat=1") is not None


def test_a_claim_tells_its_owner(claims: Claims) -> None:
    claims.take("a")
    owner = json.loads((claims.folder / "a.0").read_text())
    assert (owner["host"], owner["pid"]) == (platform.node(), os.getpid())
    assert owner["time"] > 1.7e9


def test_a_dead_process_loses_its_claim_at_once(claims: Claims) -> None:
    plant(claims, "a.0", pid=dead_pid())
    claim = claims.take("a")
    assert claim is not None
    assert files(claims) == ["a.0", "a.1"]
    assert claims.take("a") is None
    claim.release()
    assert files(claims) == []


def test_a_restarted_container_has_the_process_id_of_the_one_before(claims: Claims) -> None:
    plant(claims, "a.0", pid=os.getpid())
    assert claims.take("a") is not None


@pytest.mark.parametrize(("age", "taken"), [(300, False), (1200, True)])
def test_a_live_process_keeps_it_unless_it_hangs_or_only_has_the_number_of_a_dead_one(
    claims: Claims, age: float, taken: bool
) -> None:
    plant(claims, "a.0", age=age, pid=os.getppid())
    assert (claims.take("a") is not None) == taken


@pytest.mark.parametrize(("age", "taken"), [(300, False), (1200, True)])
def test_a_process_elsewhere_loses_it_after_a_long_silence(claims: Claims, age: float, taken: bool) -> None:
    plant(claims, "a.0", age=age, host="elsewhere", pid=dead_pid())
    assert (claims.take("a") is not None) == taken


@pytest.mark.parametrize(("age", "taken"), [(300, False), (1200, True)])
def test_an_unreadable_claim_may_be_being_written(claims: Claims, age: float, taken: bool) -> None:
    plant(claims, "a.0", age=age).write_text("")
    path = claims.folder / "a.0"
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    assert (claims.take("a") is not None) == taken


def test_a_process_that_beats_keeps_it(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = claims.take("a")
    assert claim is not None
    path = plant(claims, "a.0", age=1200, host="elsewhere")
    claim.beat()  # too early to do anything
    assert path.stat().st_mtime < claims._now() - 1000
    claim.last_beat -= 60
    claim.beat()
    assert path.stat().st_mtime > claims._now() - 100
    assert claims.take("a") is None
    path.unlink()
    claim.last_beat -= 60
    claim.beat()  # another took it over and finished


def test_whoever_finds_a_dead_claim_too_late_does_not_get_it(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between finding it dead and taking it over, others took it over, finished, and took it anew."""
    plant(claims, "a.0", pid=dead_pid())
    own = module.create_once

    def late(path: Path, content: bytes) -> bool:
        monkeypatch.setattr(module, "create_once", own)
        other = claims.take("a")
        assert other is not None
        other.release()
        assert claims.take("a") is not None
        return own(path, content)

    monkeypatch.setattr(module, "create_once", late)
    assert claims.take("a") is None
    assert files(claims) == ["a.0"]


def test_of_many_at_the_same_time_one_gets_a_dead_claim(claims: Claims) -> None:
    for attempt in range(20):
        plant(claims, f"{attempt}.0", pid=dead_pid()) if attempt % 2 else None
        barrier, got = threading.Barrier(8), []

        def take(barrier: threading.Barrier = barrier, got: list[Any] = got, name: str = str(attempt)) -> None:
            barrier.wait()
            got.append(claims.take(name))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(claim is not None for claim in got) == 1


def test_without_links_files_are_still_created_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Any, target: Any) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert create_once(tmp_path / "a", b"1")
    assert not create_once(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
