"""What needs a package that is not installed is skipped; what fails for another reason fails."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import optional_packages
import pytest
from optional_packages import OPTIONAL, missing_package

import lightning_attr
from lightning_attr.errors import MissingDependencyError


@pytest.fixture
def without_dattri(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("dattri.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dattri", None)  # importing it fails
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dattri" else find(name))


def error_of(source: str, filename: str = __file__) -> BaseException:
    with pytest.raises(ImportError) as caught:
        exec(compile(source, filename, "exec"), {"MissingDependencyError": MissingDependencyError})
    return caught.value


@pytest.mark.usefixtures("without_dattri")
def test_a_package_that_is_not_installed_is_named() -> None:
    assert missing_package(error_of("import dattri")) == "dattri"
    assert missing_package(error_of("from dattri.task import AttributionTask")) == "dattri"
    wrapped = "try:\n    import dattri\nexcept ImportError as error:\n    raise MissingDependencyError('it') from error"
    assert missing_package(error_of(wrapped)) == "dattri"


@pytest.mark.usefixtures("without_dattri")
def test_the_package_itself_must_not_need_it_without_a_word() -> None:
    ours = str(Path(lightning_attr.__path__[0]) / "interop.py")
    assert missing_package(error_of("import dattri", ours)) is None
    wrapped = "try:\n    import dattri\nexcept ImportError as error:\n    raise MissingDependencyError('it') from error"
    assert missing_package(error_of(wrapped, ours)) == "dattri"


def test_other_errors_are_none() -> None:
    assert missing_package(ValueError("no")) is None
    assert missing_package(error_of("import lightning_attr.no_module")) is None


def test_a_file_and_a_test_that_need_it_are_skipped(pytester: pytest.Pytester) -> None:
    name = "no_such_package"
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text("utf-8"))
    pytester.makepyfile(
        test_file=f"import {name}",
        test_inside=f"""
            import pytest
            def test_needs_it(): import {name}
            def test_other(): import another_package
            @pytest.fixture
            def made(): import {name}
            def test_fixture(made): pass
        """,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optional_packages, "OPTIONAL", OPTIONAL | {name})
        result = pytester.runpytest_inprocess("-ra", "-p", "no:cacheprovider")
    result.assert_outcomes(skipped=3, failed=1)
    result.stdout.fnmatch_lines(["*needs no_such_package*"])
