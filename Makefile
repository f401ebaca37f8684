# make demo | test | check: each makes the virtual environment it needs, from wheels.

PYTHON ?= python3
VENV ?= .venv
MPI ?= mpich
BIN = $(VENV)/bin

export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test check lint types test-openmpi test-frameworks test-pythons test-nvrtc
.PHONY: test-cluster test-on-cluster test-ptx rehearse-gpu environments traffic bench bench-quick
.PHONY: clean docs test-packages

# As many ranks as cores, but at least 2 and at most 4.
CORES ?= $(shell unset OMP_NUM_THREADS; nproc || getconf _NPROCESSORS_ONLN)
RANKS = $(shell echo $$(($(CORES) < 2 ? 2 : $(CORES) > 4 ? 4 : $(CORES))))
demo: $(VENV)/demo.stamp
	@echo "Ranks: $(RANKS) (cores: $(CORES))"
	$(BIN)/mpiexec -n $(RANKS) $(BIN)/python -m mpi4py examples/train_digits.py

# Two at a time; the tests of a file stay together, because they share what the file has started. Files
# go by name: by the number of tests, which is what the runner would do, a few long ones come last.
test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

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

# What needs PyTorch or JAX (Numba is in the other environments too); then what looks different with
# Numba computing.
FRAMEWORKS = any_array bench binding docs double_backward jax migration names primitives pytorch \
	reference torch torch_direct torch_graphs torch_groups torch_masks torch_models torch_ranks \
	torch_table torch_tensors torch_tools torch_transforms
NUMBA = binding check_finite collective double_backward functional layers mask recalibrate \
	statistics sync
test-frameworks:
	$(MAKE) VENV=.venv-frameworks .venv-frameworks/frameworks.stamp
	.venv-frameworks/bin/python -m pytest $(FRAMEWORKS:%=tests/test_%.py)
	CUPYBN_CPU_BACKEND=numba .venv-frameworks/bin/python -m pytest -m 'not mpi and not gpu' \
		$(NUMBA:%=tests/test_%.py)
	.venv-frameworks/bin/python -m pytest -m compiles

# The site, build/docs/index.html: a warning is an error. With PyTorch and JAX, which the modules in
# its reference import.
docs:
	$(MAKE) VENV=.venv-frameworks .venv-frameworks/docs.stamp
	.venv-frameworks/bin/python -m sphinx -q -W --keep-going -b html docs build/docs
	.venv-frameworks/bin/python -m pytest -q tests/test_site.py
	@echo "build/docs/index.html"

# A quick choice of tests with the oldest supported Python and NumPy, and with the newest Python.
QUICK = any_array architecture binding check_finite checkpoint cli collective distributed \
	double_backward failures functional layers names primitives pure recalibrate state \
	statistics
test-pythons:
	.ci/pythons $(QUICK:%=tests/test_%.py)

# The wheel and the sdist, in empty environments of every supported Python that this machine has.
test-packages: $(VENV)/release.stamp
	.ci/packages $(BIN)

# The kernels, compiled by NVRTC for every architecture; no GPU needed, about 450 MB of wheels.
test-nvrtc:
	$(MAKE) VENV=.venv-nvrtc .venv-nvrtc/nvrtc.stamp
	.venv-nvrtc/bin/python -m pytest tests/test_compile.py tests/test_sass.py

# The kernels on the CPU, in the machine for PTX of tests/ptx: all; `make test` has a quick choice.
KERNELS = check_finite cuda_backend cuda_layers kernels ptx ptx_graphs ptx_kernels resident traffic
test-ptx: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu' \
		$(KERNELS:%=tests/test_%.py)

# The three steps that wait for a GPU (docs/gpu-checklist.md), without one.
rehearse-gpu: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m rehearsal tests/test_on_gpu.py

# On a cluster of hosts with sshd and Slurm that it makes of namespaces, as root: the recipes of
# docs/clusters.md, and faults. Each has a second try, for limits of seconds on a busy machine. A
# quick choice of them: make CLUSTER='-m "not slow"' test-cluster
CLUSTER ?= -m ''
CLUSTER_MPIS ?= mpich openmpi impi
CLUSTER_PYTHON = .venv-cluster-$(firstword $(CLUSTER_MPIS))/bin/python
test-cluster:
	if tests/cluster/cluster --possible; then $(MAKE) test-on-cluster; fi

test-on-cluster: $(CLUSTER_MPIS:%=.venv-cluster-%/cluster.stamp)
	$(CLUSTER_PYTHON) -m pytest tests/cluster/leftovers.py
	CUPYBN_CLUSTER="$(foreach mpi,$(CLUSTER_MPIS),$(mpi)=.venv-cluster-$(mpi))" \
		tests/cluster/cluster $(CLUSTER_PYTHON) -m pytest --reruns 1 $(CLUSTER) \
		tests/cluster/recipes.py tests/cluster/launches.py tests/cluster/faults.py

# All that the tests need. Builds of one checkout must not run at once, tests may: make -j2.
environments:
	$(MAKE) $(VENV)/test.stamp $(VENV)/release.stamp
	$(MAKE) MPI=openmpi VENV=.venv-openmpi .venv-openmpi/test.stamp
	$(MAKE) VENV=.venv-frameworks .venv-frameworks/docs.stamp
	$(MAKE) VENV=.venv-nvrtc .venv-nvrtc/nvrtc.stamp

# Global memory traffic of the kernels, counted in the machine for PTX.
traffic: $(VENV)/test.stamp
	$(BIN)/python tests/traffic.py --json traffic.json

# Where the library stands here: some minutes; docs/performance.md has a run. PyTorch, JAX and Numba
# are measured where they are installed, as in `make VENV=.venv-frameworks bench`. The quick form is
# part of the tests.
bench: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks --json bench.json --plot bench.png
	$(BIN)/mpiexec -n 2 $(BIN)/python -m mpi4py -m benchmarks comm --json bench-comm.json

bench-quick: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks --quick
	$(BIN)/mpiexec -n 2 $(BIN)/python -m mpi4py -m benchmarks comm --quick

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml setup.cfg | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$(MPI),examples]'
	touch $@

$(VENV)/test.stamp: pyproject.toml setup.cfg | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$(MPI),dev]'
	touch $@

$(VENV)/quick.stamp: pyproject.toml setup.cfg | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$(MPI),test]'
	touch $@

.venv-cluster-mpich/cluster.stamp: NEEDS = '.[mpich,cpu,examples]'
.venv-cluster-openmpi/cluster.stamp: NEEDS = '.[openmpi,examples]'
.venv-cluster-impi/cluster.stamp: NEEDS = '.[examples]' impi-rt
.venv-cluster-%/cluster.stamp: pyproject.toml setup.cfg
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet pytest pytest-timeout pytest-rerunfailures \
		--editable $(NEEDS)
	touch $@

$(VENV)/nvrtc.stamp: pyproject.toml setup.cfg | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$(MPI),nvrtc]'
	touch $@

# PyTorch by itself and first, so that a build for the CPU alone is taken where pip is offered one.
$(VENV)/frameworks.stamp: pyproject.toml setup.cfg | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[$(MPI),cpu,test]' jax flax
	touch $@

$(VENV)/release.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet build twine check-wheel-contents
	touch $@

$(VENV)/docs.stamp: $(VENV)/frameworks.stamp
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-openmpi .venv-cluster-* .venv-frameworks .venv-nvrtc .venv-3.* build dist *.egg-info
