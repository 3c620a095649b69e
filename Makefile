# make demo | make test: each sets up what it needs. PYTHON chooses the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# DeepSpeed is built from its sources, with a page of warnings that nobody here can do anything about.
PIP := PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --constraint constraints.txt
WHOLE_FILES := --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test test-fast lint benchmark gpu oldest clean

setup: $(VENV)/installed

# Quiet pip prints errors alone. Its progress bars, which show what is being downloaded, are for people at a terminal.
$(VENV)/installed: setup.py constraints.txt
	@echo "Installing PyTorch, DALI, DeepSpeed, Ray and what else setup.py names into $(VENV)/:"
	@echo "about 4 GB to download and 8 GB on the disk; two minutes with a fast connection and warm caches."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) $(if $(shell test -t 2 && echo yes),--progress-bar on) --editable \
		".[cuda13,deepspeed,ray,export,heic,packaged,probe,remote,reproduce,dev]"
	touch $@

demo: setup
	$(PY) launch/synthesize.py --output runs/demo/photographs
	$(PY) launch/train.py --recipe launch/recipes/fpcn_small.yaml --data runs/demo/photographs --output runs/demo/run

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyright

# More tests at a time than a small machine has cores: many wait for a cluster. A file stays together, as what its tests
# share is made once for each worker.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 $(WHOLE_FILES)

# The inner loop: without clusters, launchers, and tests that train until something is learnt.
test-fast: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(WHOLE_FILES) -m "not slow"

benchmark: setup
	$(PY) -m benchmarks masked_pool
	$(PY) -m benchmarks pair_contrast
	$(PY) -m benchmarks step

# In calls of nine minutes. PY=python3 takes a Python that has torch, triton, numpy, pytest and rich, and sets up nothing.
gpu: $(if $(filter $(VENV)/bin/python,$(PY)),setup)
	PYTHONPATH=kernels $(PY) -m benchmarks gpu --minutes $(or $(MINUTES),9) $(if $(ONLY),--only $(ONLY))

# The kernels with the oldest versions that setup.py admits: half an hour on two cores, so not in `make test`.
oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet 'torch==2.11.*' 'triton==3.6.*' 'numpy==2.4.*' pytest pytest-xdist hypothesis
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 tests/kernels --deselect \
	    tests/kernels/test_compiled.py::test_no_kernel_spills_or_outgrows_the_multiprocessor
	for arch in 80 86 90 100; do \
	    PYTHONPATH=.:kernels .venv-oldest/bin/python -m tests.kernels.compile_production $$arch >/dev/null || exit 1; done

clean:
	rm -rf $(VENV) .venv-oldest build *.egg-info
