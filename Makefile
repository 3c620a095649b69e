# make demo | make test: each sets up what it needs. PYTHON chooses the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: setup demo test lint benchmark clean

setup: $(VENV)/installed

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --upgrade pip setuptools wheel
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[cuda13,deepspeed,ray,export,reproduce,dev]"
	touch $@

demo: setup
	$(PY) launch/synthesize.py --output runs/demo/photographs
	$(PY) launch/train.py --recipe launch/recipes/fpcn_small.yaml --data runs/demo/photographs --output runs/demo/run

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyright

# More tests at a time than a small machine has cores: many wait for a cluster.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 --dist worksteal

benchmark: setup
	$(PY) -m benchmarks masked_pool
	$(PY) -m benchmarks pair_contrast
	$(PY) -m benchmarks step

clean:
	rm -rf $(VENV) build *.egg-info
