"""Runs the tests of each package in an environment of its own: ``make test-packages``, or ``PACKAGE="timm darts"``.

What all need (torch, torchvision, this project, pytest) is installed once, in ``build/packages/base``; the environment
of a package adds what its file in ``requirements/`` names. What cannot be installed is reported, and stops nothing.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
BUILD = REPOSITORY / "build" / "packages"
REQUIREMENTS = {path.stem: path for path in sorted((HERE / "requirements").glob("*.txt"))}


def main(chosen: list[str]) -> int:
    unknown = [name for name in chosen if name not in REQUIREMENTS]
    if unknown:
        print(f"No such package: {', '.join(unknown)}. There are: {', '.join(REQUIREMENTS)}.")
        return 2
    base = BUILD / "base"
    if not (base / "installed").exists():
        venv.create(base, with_pip=True, clear=True)
        pip(
            base, *shlex.split(os.environ.get("TORCH") or "torch"), "torchvision", "pytest", "-e", str(REPOSITORY)
        ).check_returncode()
        (base / "installed").touch()
    results = {name: run(name, base) for name in chosen or REQUIREMENTS}
    print()
    for name, (versions, outcome) in results.items():
        print(f"{name:30} {versions:40} {outcome}")
    return int(not all(re.match(r"\d+ passed", outcome) for _, outcome in results.values()))


def run(name: str, base: Path) -> tuple[str, str]:
    """Make the environment and run its tests; the version tried, and pytest's last words."""
    print(f"== {name}", flush=True)
    own = BUILD / name
    if not (own / "installed").exists():
        venv.create(own, with_pip=False, clear=True)
        # The base's .pth files count as well: this project is installed by one.
        (site_packages(own) / "base.pth").write_text(f"import site; site.addsitedir({str(site_packages(base))!r})\n")
        log = BUILD / f"{name}.log"
        with log.open("w") as file:
            installed = pip(own, "-r", str(REQUIREMENTS[name]), output=file)
        if installed.returncode:
            return "", f"not installed, see {log}"
        (own / "installed").touch()
    test = HERE / f"test_{name}.py"
    command = [own / "bin" / "python", "-m", "pytest", "-q", "--tb=short", "--disable-warnings", test]
    tested = subprocess.run(command, cwd=REPOSITORY, check=False, stdout=subprocess.PIPE, text=True)
    print(tested.stdout, flush=True)
    lines = tested.stdout.strip().splitlines() or ["nothing printed"]
    return version(name, own), lines[-1].strip("= ")


def pip(environment: Path, *arguments: str, output: object = None) -> subprocess.CompletedProcess[str]:
    command = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", *arguments]
    return subprocess.run(command, check=False, stdout=output, stderr=output, text=True)  # type: ignore[call-overload]


def site_packages(environment: Path) -> Path:
    return next((environment / "lib").glob("python*/site-packages"))


def version(name: str, environment: Path) -> str:
    package = re.split(r"[\[<>=~ ]", REQUIREMENTS[name].read_text().split()[0])[0]
    code = "import sys; from importlib.metadata import version; print(sys.argv[1], version(sys.argv[1]))"
    found = subprocess.run(
        [environment / "bin" / "python", "-c", code, package], check=False, stdout=subprocess.PIPE, text=True
    )
    return found.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
