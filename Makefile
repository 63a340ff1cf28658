PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

# Without kept bytecode every process that a test starts compiles torch, diffusers and transformers again: 15 s of computing
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow bench bench-snap lint types

# One prompt, the embedded model, a pruning board and a record, in ./demo
demo: $(VENV)/.installed
	$(BIN)/ttsnap generate "a red circle left of a blue square" --steps 4 --compare --out demo

# Lint, types and the fast tests
test: lint types
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

# Equal cost with the clean reward, what a search costs beside its calls, replay
bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/equal_cost.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/replay.py

# One sample, best-of-N, TTSp and TTSnap at equal cost, as a Markdown table; about a quarter of an hour
bench-snap: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/snap.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m tools.model_tables --check
	$(BIN)/python -m tools.leaderboard --check
	$(BIN)/python -m tools.evidence
	$(BIN)/python -m tools.mutants --check

types: $(VENV)/.installed-dev
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[diffusion,replay]"
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.installed
