# make chat, make test: each sets up all it needs on a fresh machine (Python 3.11+).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=

.PHONY: chat test check lint types setup setup-dev clean

chat: setup
	@$(BIN)/glm5 chat $(if $(MODEL),--model $(MODEL))

test: setup-dev
	@# One thread a worker: workers with several would wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

check: lint types test

lint: setup-dev
	$(BIN)/ruff check glm5 tests benchmarks
	$(BIN)/ruff format --check glm5 tests benchmarks

types: setup-dev
	$(BIN)/mypy

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

# torch goes first and alone: the pin gives a CPU build where pip finds one.
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) (torch is a large download) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
