# Two commands: `make demo` shows a model planned, tuned and trained; `make test` runs the whole check.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED := 1

WITH_RANKS := tests/backends tests/sft tests/tuner

.PHONY: setup test checks test-ranks test-rest demo clean

setup:
	@$(PYTHON) tools/setup_env.py

test: setup
	@echo "the checks and both halves of the tests run side by side; each is shown when it is done, after some minutes"
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target checks test-ranks test-rest

checks:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-ranks:
	$(BIN)/pytest $(WITH_RANKS)

test-rest:
	$(BIN)/pytest $(addprefix --ignore=,$(WITH_RANKS))

demo: setup
	@$(BIN)/python tools/demo.py

clean:
	rm -rf .venv .cache .zplan runs
