"""What every test gets: fixed seeds, a working directory of its own, and a process left as it was found."""

from __future__ import annotations

import gc
import logging
import os
import random
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from optional_packages import missing_package

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

torch.set_num_threads(1)  # on matrices as small as the tests', threads only wait for each other

REPOSITORY = Path(__file__).parents[1]

# `caplog` reads at the root. Lightning sends it nothing where it had no handler at the first import, as under pytest 8.
for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).propagate = True


gc.disable()  # until all tests are collected


def pytest_collection_finish() -> None:
    """What packages and test files made is here to stay, and takes long to look through: a second each time."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file that imports an optional package which is not installed is skipped as a whole."""
    report = yield
    call = getattr(report, "call", None)
    if report.failed and call is not None and (package := missing_package(call.excinfo.value)):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: needs {package}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """A test that comes to need one is skipped itself."""
    try:
        return (yield)
    except Exception as error:
        if package := missing_package(error):
            pytest.skip(f"needs {package}")
        raise


pytest_runtest_setup = pytest_runtest_call  # its fixtures may need one as well


@pytest.fixture(scope="session")
def new_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes an empty directory, without the look at all names that there are which `tmp_path` takes for each test."""
    paths = map(tmp_path_factory.mktemp("own").joinpath, map(str, count()))

    def make() -> Path:
        path = next(paths)
        path.mkdir()
        return path

    return make


@pytest.fixture(autouse=True)
def own_directory(request: pytest.FixtureRequest, new_directory: Callable[[], Path]) -> Iterator[None]:
    """Lightning writes into the working directory: `lightning_logs/` belongs to the test, not to the repository.

    It is `tmp_path` where the test has it.
    """
    before = Path.cwd()
    os.chdir(request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else new_directory())
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def own_seeds_and_environment() -> Iterator[None]:
    """Starts each test from seed 0; puts random streams, environment variables and what Trainers set back after it."""
    environment = os.environ.copy()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    # The global generators are what has to be isolated: Lightning's `seed_everything` sets them.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    # `torch.manual_seed` formats the stack for CUDA, which takes a millisecond where there is none.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _settings() -> dict[str, object]:
    """The process-wide settings of torch that a test must not leave changed."""
    module = torch.nn.modules.module
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "hooks on all modules": len(module._global_forward_hooks) + len(module._global_forward_pre_hooks),
    }


@pytest.fixture(autouse=True)
def no_settings_left() -> Iterator[None]:
    """A test that leaves a setting of torch changed fails itself, and not the test after it."""
    before = _settings()
    yield
    after = _settings()
    torch.set_default_dtype(before["default dtype"])
    torch.set_grad_enabled(before["grad mode"])
    torch.set_float32_matmul_precision(before["matmul precision"])
    left = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not left, f"the test left settings of torch changed (before, after): {left}"


@pytest.fixture
def repository() -> Path:
    """The root of the repository; skips where the tests run without it, against an installed wheel."""
    if not (REPOSITORY / "lightning_attr").is_dir():
        pytest.skip("needs the repository's folders, and runs away from them")
    return REPOSITORY
