# make quickstart   set up and watch a small model learn a skill (a few minutes)
# make test         set up and run the checks: style, types, tests
# make test-all     the same and the slow tests: before a release, and on every push
# make benchmark    compare with TRL on this machine (a few minutes)
# make docs         build the documentation site into build/site
# make notebooks    write the .ipynb files from notebooks/*.py
#
# PYTHON=python3.12 picks another Python (3.11 or later); VENV=elsewhere another place for the environment,
# OUTPUT=again another folder for the quickstart's result.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
OUTPUT ?= quickstart

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check install
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-all benchmark docs notebooks lint format clean
MAKEFLAGS += --no-print-directory

help:
	@echo "make quickstart   set up and watch a small model learn a skill (a few minutes)"
	@echo "make test         set up and run the checks: style, types, tests"
	@echo "make test-all     the same and the slow tests: before a release, and on every push"
	@echo "make benchmark    compare with TRL on this machine (a few minutes)"
	@echo "make docs         build the documentation site into build/site"
	@echo "make notebooks    write the .ipynb files from notebooks/*.py"
	@echo "make lint         style and types only"
	@echo "make format       apply the common style"
	@echo "make clean        remove the environment and everything built"

quickstart: $(VENV)/.runtime
	@$(BIN)/fettle quickstart --output $(OUTPUT)

test test-all: lint
	@echo "Running the tests ..."
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -rs $(if $(filter test,$@),-m "not slow")

benchmark: $(VENV)/.runtime
	@$(BIN)/python benchmarks/compare.py --set short

docs: $(VENV)/.docs
	@$(BIN)/zensical build --clean --strict
	@echo "The site is in build/site: open build/site/index.html"

notebooks: $(VENV)/.dev
	@$(BIN)/python tools/notebooks.py

lint: $(VENV)/.dev
	@echo "Checking style and types ..."
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary

format: $(VENV)/.dev
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

clean:
	@rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .cache
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. Each step leaves a stamp, and is done again when what it was made from changes.

$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: install Python 3.11 or later, or name another one with PYTHON=..."; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fettle needs Python 3.11 or later, and $(PYTHON) is $$($(PYTHON) -V 2>&1 | cut -d" " -f2): name a newer one with PYTHON=python3.12 or the like."; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make environments: install its venv package first (sudo apt install python3-venv)."; exit 2; }
	@echo "Making the environment in $(VENV) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

# torch goes first and alone, by its exact version, so that nothing after it picks another copy.
$(VENV)/.runtime: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing PyTorch (the largest part) ..."
	@$(PIP) "$(TORCH)"
	@echo "Installing fettle and what it needs ..."
	@$(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "Installing the tools for checks and tests ..."
	@$(PIP) --constraint constraints.txt --editable ".[dev]"
	@touch $@

# Docstrings are read from the source text, so the site needs neither fettle nor PyTorch installed.
$(VENV)/.docs: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing the tools for the documentation ..."
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $@.txt
	@$(PIP) --constraint constraints.txt --requirement $@.txt
	@touch $@
