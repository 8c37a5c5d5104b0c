# `make demo` is the whole job in minutes; `make test` is what CI runs. Both build .venv by themselves.
PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check
# One OpenMP thread per process unless told: several processes with many threads each spin for hours.
export OMP_NUM_THREADS ?= 2

.PHONY: all demo test bench check clean
all: .venv/installed

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[train,export,dev]'
	$(PIP) install -q -c constraints.txt --no-deps torchvision timm open_clip_torch
	touch $@

demo: .venv/installed
	.venv/bin/python train/demo.py

test: .venv/installed check
	.venv/bin/python -m pytest tests

bench: .venv/installed
	.venv/bin/python -m pytest bench

check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf .venv demo build *.egg-info .pytest_cache .ruff_cache
