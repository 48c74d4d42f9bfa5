# Two commands need nothing but Python >= 3.10, make and pip: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# The tests keep one thread per process: two worker processes share two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check bench gpu paper gallery docs lint clean

help:  ## say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/demo.stamp  ## train a far-pair network under every arm and write a report (about 5 minutes)
	$(BIN)/python -m experiments.compare far-pair

test: .venv/dev.stamp  ## the tests, without the slow ones
	$(PYTEST) -n 2 -m "not slow"

test-slow: .venv/dev.stamp  ## the tests that take minutes
	$(PYTEST) -n 2 -m slow

lint: .venv/dev.stamp  ## style, types, and the rule that imports run downward only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

paper: .venv/demo.stamp  ## every claim of the paper that takes minutes, re-run from what is missing, and its page
	$(BIN)/python -m experiments.paper

gallery: .venv/dev.stamp  ## the ERFs of 24 models of timm, and the figure of README
	$(BIN)/python -m experiments.timm.gallery

docs: .venv/dev.stamp  ## build the documentation and run its notebooks; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

check: lint docs test  ## all that CI asks for

bench: .venv/dev.stamp  ## speed, as ratios to named rivals in the same run; leave the machine alone meanwhile
	$(BIN)/pip install -q -e '.[bench]'
	$(BIN)/python -m experiments.bench

gpu: .venv/dev.stamp  ## where there is a CUDA GPU: are the kernels right on it, and how fast; 5 minutes, unattended
	$(BIN)/pip install -q -e '.[bench]'
	$(BIN)/python -m experiments.gpu kernels

.venv/bin/python:
	$(PYTHON) -m venv .venv

# What the installation depends on: the kernels are compiled anew when their sources change.
SOURCES := pyproject.toml setup.py $(wildcard widerf/kernels/csrc/*)

.venv/demo.stamp: $(SOURCES) | .venv/bin/python
	$(BIN)/python -m pip install -q -e .
	touch $@

.venv/dev.stamp: $(SOURCES) | .venv/bin/python
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@ .venv/demo.stamp

clean:  ## remove all that was made, the virtual environment too
	rm -rf .venv build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
