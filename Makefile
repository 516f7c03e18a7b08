# Two commands: `make demo` shows a model planned, tuned and trained; `make test` runs the whole check.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED := 1

.PHONY: setup test demo clean

setup:
	@$(PYTHON) tools/setup_env.py

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

demo: setup
	@$(BIN)/python tools/demo.py

clean:
	rm -rf .venv .cache .zplan runs
