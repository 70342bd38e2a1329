# `make demo` and `make test` need nothing but make and Python >= 3.10: the rest is installed into .venv.
#   make test TORCH="torch==2.13.0"   while making .venv, first `pip install` this (without it: the newest torch, with CUDA)
#   make test PYTHON=python3.12       makes .venv with this Python
#   make test ARGS="-k trak"          passes arguments on to pytest
PYTHON ?= python3
TORCH ?=
ARGS ?=
PACKAGE ?=
VENV ?= .venv

BIN := $(VENV)/bin
# Stamps: an extra is installed again only when pyproject.toml is newer.
EXAMPLES := $(VENV)/.installed-examples
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
BENCHMARKS := $(VENV)/.installed-benchmarks
BENCHMARK_SCRIPTS ?= $(filter-out %/gpu_check.py,$(shell grep -ls __main__ tests/benchmarks/*.py))  # that has a target
# Quoted word by word: the shell must not read `torch>=2.4` as a redirection.
INSTALL_TORCH = $(if $(TORCH),install $(foreach word,$(TORCH),'$(word)'))

# Tests start many processes: each would compile the package, and pytest every test file, anew.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help demo test test-slow test-all test-device gpu-check test-oldest test-packages setup lint types typing doctest docs examples bench wheel-check clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile

demo: $(EXAMPLES)  ## trace wrong predictions to the mistakes behind them, and retrain
	$(BIN)/python examples/systematic_mistakes.py

test: $(DEV)  ## the quick tests, on all cores
	$(BIN)/pytest -n auto -m "not slow" $(ARGS)

test-slow: $(DEV)  ## the slow tests
	$(BIN)/pytest -m slow $(ARGS) || [ $$? -eq 5 ]  # 5: pytest found none

test-all: $(DEV)  ## every test
	$(BIN)/pytest $(ARGS)

# The device is built with g++ and ninja when it is first wanted; without them its tests skip themselves.
test-device: $(DEV)  ## the tests on a simulated accelerator
	$(BIN)/pytest -m "not slow" tests/simulated_device $(ARGS)

gpu-check: $(DEV)  ## correctness, waits and costs on this machine's accelerator (ARGS="--device sim --small": dry run)
	PYTHONPATH=tests:tests/simulated_device $(BIN)/python tests/benchmarks/gpu_check.py $(ARGS)

test-oldest:  ## the quick tests on the oldest versions that pyproject.toml admits
	.ci/oldest $(ARGS)

# Several gigabytes, in build/packages/: not among the tests of .ci/run.
test-packages: $(BIN)/python  ## other people's packages, each in an environment of its own (PACKAGE="timm darts": only these)
	TORCH="$(TORCH)" $(BIN)/python tests/packages/environments.py $(PACKAGE)

setup: $(DEV)  ## make .venv, with the project and all tools in it

lint: $(DEV)  ## ruff, its formatter's check, and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

# callbacks/ installs as lightning_attr.callbacks; .typing/ shows type checkers and editors the installed layout.
typing:  ## make .typing/, the installed layout as links
	rm -rf .typing
	mkdir -p .typing/lightning_attr
	ln -s $(addprefix ../../,$(filter-out %/__pycache__,$(wildcard lightning_attr/*))) .typing/lightning_attr/
	ln -s ../../callbacks .typing/lightning_attr/callbacks

types: typing $(DEV)  ## mypy --strict on the package, and on the calls users write
	cd .typing && $(abspath $(BIN))/mypy --config-file ../pyproject.toml -p lightning_attr
	cd .typing && $(abspath $(BIN))/mypy --config-file ../pyproject.toml ../tests/types/usage.py

doctest: $(DEV)  ## the examples in the docstrings
	$(BIN)/pytest tests/test_doctests.py $(ARGS)

# -W: a warning, such as of a link that leads nowhere, is an error.
SPHINX = OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --quiet --keep-going -W -d build/doctrees
docs: $(DOCS)  ## the site of guides and docstrings, in build/docs/
	$(SPHINX) -b html examples/guides build/docs
	$(SPHINX) -b linkcheck examples/guides build/links
	@echo "build/docs/index.html"

# Two at a time, each on one core; what one prints comes in one piece.
RUN_EXAMPLE = printed=$$(OMP_NUM_THREADS=1 $(BIN)/python $$0 2>&1); code=$$?; printf "== %s\n%s\n" $$0 "$$printed"; exit $$code
examples: $(DEV)  ## run every example
	@printf '%s\n' examples/*.py | xargs -n 1 -P 2 sh -c '$(RUN_EXAMPLE)'

bench: $(BENCHMARKS)  ## run every benchmark (or BENCHMARK_SCRIPTS="tests/benchmarks/...")
	@set -e; for script in $(BENCHMARK_SCRIPTS); do echo "== $$script"; $(BIN)/python $$script; done

# What a user of the wheel gets, from the last commit, in an environment that holds nothing else: first every module is
# imported with no extra installed and the tests are collected, then the quick tests run far from the repository (what needs it skips itself).
define IMPORT_EVERY_MODULE
import importlib, pkgutil, lightning_attr
names = [module.name for module in pkgutil.walk_packages(lightning_attr.__path__, "lightning_attr.")]
assert "lightning_attr.callbacks" in names, names
for name in names:
    importlib.import_module(name)
print(len(names), "modules, from", lightning_attr.__file__)
endef
export IMPORT_EVERY_MODULE
wheel-check: $(DEV)  ## build the last commit, install its wheel in an empty environment, run the quick tests there
	rm -rf build
	@set -eu; unset PYTHONPATH; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	mkdir "$$work/source" "$$work/away"; \
	git archive HEAD | tar -x -C "$$work/source"; \
	$(BIN)/python -m build --outdir "$$work/dist" "$$work/source"; \
	$(BIN)/python -m venv "$$work/venv"; \
	wheel=$$(echo "$$work"/dist/*.whl); \
	$(if $(TORCH),"$$work/venv/bin/pip" --quiet $(INSTALL_TORCH);) \
	"$$work/venv/bin/pip" install --quiet "$$wheel"; \
	cp -r "$$work/source/tests" "$$work/source/pyproject.toml" "$$work/away"; \
	cd "$$work/away"; \
	echo "== import every module of the wheel, no extra installed"; \
	"$$work/venv/bin/python" -c "$$IMPORT_EVERY_MODULE"; \
	"$$work/venv/bin/pip" install --quiet pytest; \
	echo "== collect the tests, no extra installed"; \
	"$$work/venv/bin/pytest" --collect-only -qq -m "not slow" >collected || { cat collected; exit 1; }; \
	"$$work/venv/bin/pip" install --quiet "$$wheel[test]"; \
	echo "== quick tests against the wheel"; \
	"$$work/venv/bin/pytest" -n auto -m "not slow"

clean:  ## remove what builds, tools and runs left behind, but not .venv
	rm -rf build dist .typing .mypy_cache .pytest_cache .ruff_cache *.egg-info lightning_logs
	find lightning_attr callbacks tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# --clear: what is there has no working Python. On failure nothing stays, so that the next run starts afresh.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "No '$(PYTHON)' found. Install Python >= 3.10, or name yours: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "lightning_attr needs Python >= 3.10, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(if $(TORCH),$(BIN)/pip $(INSTALL_TORCH))
	$(BIN)/pip install --quiet --editable ".[$*]"
	@touch $@ $(if $(filter dev,$*),$(EXAMPLES))
