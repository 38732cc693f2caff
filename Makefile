# Every target makes its own environment: a machine needs only Python >= 3.11 with venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SA20 := .venv-sa20
PIP := -m pip --disable-pip-version-check --quiet install
WORKERS ?= 3
KILLS ?= 200
SECONDS ?= 180
SEEDS ?= 100000
PROGRAMS ?= 25
ARGS ?=
# Each process collects all tests, so several of them are not worth it for a few tests.
PARALLEL = $(if $(filter -k -k% tests%,$(ARGS)),,-n $(WORKERS) --dist worksteal)

# Tests start hundreds of processes. Each of them would compile the whole package again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-deep test-sa20 format lint docs bench torture soak fuzz clean

help:  ## List the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.all  ## The same agent memory twice, by hand and with memstate_sa, through faults and a kill (ARGS=--help)
	$(BIN)/memstate-sa demo $(ARGS)

test: WORKERS := 4  # many of these tests wait for a moment
test: $(VENV)/.test  ## All but the long searches, on SQLite and PostgreSQL (ARGS="-k search": in one process)
	$(BIN)/pytest -m 'not deep' $(PARALLEL) $(ARGS)

test-deep: $(VENV)/.test  ## The long searches: random programs and histories, kills, torture, the larger models
	$(BIN)/pytest -m deep $(PARALLEL) $(ARGS)

test-sa20: $(SA20)/.test  ## The tests marked sa20, on SQLAlchemy 2.0
	$(SA20)/bin/python -c 'import sqlalchemy as sa; assert sa.__version__.startswith("2.0."), sa.__version__'
	$(SA20)/bin/pytest -m 'sa20 and not deep' -n $(WORKERS) --dist worksteal $$(grep -rlF mark.sa20 --include='test_*.py' tests) $(ARGS)

format: $(VENV)/.dev  ## Format the code, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/.dev  ## Style, types, import layers, plain English
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m tests.prose

docs: $(VENV)/.docs  ## The documentation as a site, in site/; a broken link fails
	$(BIN)/zensical build --strict --clean

bench: $(VENV)/.bench  ## Ratios against peers and physical limits (ARGS="--quick capture")
	$(BIN)/python -m benchmarks $(ARGS)

torture: $(VENV)/.test  ## Processes, servers and indexes that fail and are killed (SECONDS=180, or ARGS="--faults 2000")
	$(BIN)/python -m tests.torture $(if $(ARGS),$(ARGS),--seconds $(SECONDS))

soak: $(VENV)/.test  ## Kills, random and simulated histories: more of them, and other ones each time (KILLS=200)
	MEMSTATE_KILLS=$(KILLS) MEMSTATE_SEED=$$(date +%s) MEMSTATE_SIM_SEEDS=$(SEEDS) $(BIN)/pytest -m deep -n $(WORKERS) \
		--hypothesis-profile=default tests/promises/crash/test_kill.py tests/promises/undo/test_histories.py tests/simulation \
		tests/model $(ARGS)

fuzz: $(VENV)/.test  ## Random programs, captured by Sessions and by triggers: PROGRAMS=25 times as many as CI plays
	MEMSTATE_PROGRAMS=$(PROGRAMS) $(BIN)/pytest -m deep -n $(WORKERS) --hypothesis-profile=default \
		tests/promises/capture/test_differential.py $(ARGS)

clean:  ## Remove what the targets made
	rm -rf $(VENV) $(SA20) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist site .cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# -- virtual environments: a stamp for each set of packages, made again when pyproject.toml changes ---------------------

$(VENV)/bin/python $(SA20)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(@D)/..
	$@ $(PIP) --upgrade 'pip>=25.1'

$(VENV)/.all: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python $(PIP) -e '.[all]'
	touch $@

$(VENV)/.test: $(VENV)/.all
	$(BIN)/python $(PIP) --group test
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/python $(PIP) --group dev
	touch $@

$(VENV)/.bench: $(VENV)/.all
	$(BIN)/python $(PIP) --group bench
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python $(PIP) --group docs
	touch $@

$(SA20)/.test: pyproject.toml | $(SA20)/bin/python
	$(SA20)/bin/python $(PIP) -e . --group sa20
	touch $@
