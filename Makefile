# make demo: from nothing to a distilled student, its report, and an 8-bit ONNX file of it. make test: the quick tests.
SHELL := bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SHIPPED := runs/quickstart/onnx-int8

.PHONY: demo test test-all lint type docs install clean

demo: $(READY)
	@$(BIN)/kd-train experiment=quickstart
	@[ -e $(SHIPPED) ] || $(BIN)/kd-export runs/quickstart --format onnx --quantize int8-dynamic --out $(SHIPPED)
	@[ -e runs/quickstart/benchmark ] || $(BIN)/kd-benchmark runs/quickstart $(SHIPPED)
	@cat runs/quickstart/benchmark/benchmark.md

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m "not slow"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal --durations=40

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(READY)
	$(BIN)/mypy

# The site of docs/ in build/site, without a network; a dead link is an error.
docs: $(READY)
	$(BIN)/python scripts/build_docs.py

install: $(READY)

# Built again when the pinned versions or the project's dependencies change.
$(READY): pyproject.toml constraints.txt scripts/setup.sh
	@PYTHON="$(PYTHON)" bash scripts/setup.sh $(VENV)
	@touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
