"""The page in a real browser, without a network: rows, filter, search and links; no error on its console."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lightning_attr import AttributionResult, ScoreMatrix

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium to open the page with")
N_TRAIN, N_TARGET = 300, 40
HOSTILE = "</script><script>console.error('ran')</script><img src=x onerror=\"console.error('ran')\">"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N_TRAIN) % 3
    own = AttributionResult(
        ScoreMatrix(torch.randn(N_TRAIN, N_TARGET, generator=generator)),
        torch.arange(N_TRAIN) / N_TRAIN,
        torch.rand(N_TRAIN, generator=generator),
        labels,
        labels == 2,
    )
    train = [(f"sample {i} {HOSTILE}", int(labels[i])) for i in range(N_TRAIN)]
    targets = [(f"target {j} {HOSTILE}", j % 3) for j in range(N_TARGET)]
    path = tmp_path_factory.mktemp("report") / "report.html"
    return own.report(path, train, targets, classes=["cat", "dog", HOSTILE], title=HOSTILE)


def opened(page: Path, folder: Path, fragment: str = "") -> str:
    """The document after its script has run; what it wrote to the console fails the test."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    assert BROWSER is not None
    command = [BROWSER, *flags, f"--user-data-dir={folder}", "--dump-dom", f"{page.as_uri()}#{fragment}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    return run.stdout


def rows(document: str) -> list[int]:
    return [int(index) for index in re.findall(r'aria-label="Select training sample (\d+)"', document)]


def test_the_most_suspicious_samples_come_first(report: Path, tmp_path: Path) -> None:
    document = opened(report, tmp_path)
    assert rows(document) == list(range(N_TRAIN - 1, N_TRAIN - 26, -1))
    assert f"1 to 25 of {N_TRAIN}" in document
    assert f"1 to 10 of {N_TARGET}" in document
    assert document.count('aria-sort="descending"') == 1
    assert "sample 299 &lt;/script&gt;&lt;script&gt;" in document
    assert "<img src" not in document


def test_a_link_filters_sorts_searches_and_turns_pages(report: Path, tmp_path: Path) -> None:
    document = opened(report, tmp_path, "class=1&sort=index&down=0&page=1&size=10&target-query=39")
    assert rows(document) == [3 * i + 1 for i in range(10, 20)]
    assert "11 to 20 of 100" in document
    assert "1 to 1 of 1<" in document
    assert "Target #39" in document


def test_a_search_and_the_known_noise(report: Path, tmp_path: Path) -> None:
    assert rows(opened(report, tmp_path, "query=17")) == [17]
    assert rows(opened(report, tmp_path, "query=DOG&size=10&show=noise")) == []
    assert rows(opened(report, tmp_path, "show=noise&size=10")) == [299 - 3 * i for i in range(10)]


@pytest.mark.slow
def test_thousands_of_rows_and_targets_fit_on_a_page(tmp_path: Path) -> None:
    """How long it takes to open stands in tests/benchmarks/RESULTS.md."""
    n, m = 10_000, 1_000
    generator = torch.Generator().manual_seed(0)
    own = AttributionResult(
        ScoreMatrix(torch.randn(n, m, generator=generator)),
        torch.arange(n) / n,
        torch.rand(n, generator=generator),
        torch.arange(n) % 10,
    )
    images = torch.rand(n, 3, 32, 32, generator=generator)
    page = own.report(tmp_path / "report.html", images, images[:m])
    assert page.stat().st_size < 30 * 10**6
    document = opened(page, tmp_path / "browser")
    assert rows(document) == list(range(n - 1, n - 26, -1))
    assert "1 to 25 of 10000" in document
    assert "1 to 10 of 1000" in document
