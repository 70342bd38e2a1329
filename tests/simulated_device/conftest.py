"""Tests on the simulated device; without a compiler they are skipped. `make test-device` runs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Without tools to build the device, a file that needs it is skipped."""
    report = yield
    error = getattr(getattr(report, "call", None), "excinfo", None)
    if report.failed and error is not None and "the simulated device needs" in str(error.value):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {error.value}")
    return report


@pytest.fixture(autouse=True)
def parameters_stay_themselves() -> Iterator[None]:
    """As on CUDA, where `module.to(device)` keeps them."""
    from sim.emulation import like_cuda

    with like_cuda():
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cases of `test_equal.py` are equal, refused by name, or fail."""
    reports = [
        r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, []) if "test_equal" in r.nodeid
    ]
    if not reports:
        return
    counts = Counter("failing" if r.failed else dict(r.user_properties).get("outcome", "other") for r in reports)
    terminalreporter.write_sep("-", "on the simulated device, against the CPU")
    columns = ("equal", "refused by name", "failing")
    terminalreporter.write_line(" | ".join(["cases", *columns]))
    terminalreporter.write_line(" | ".join(str(n) for n in (len(reports), *(counts[c] for c in columns))))
