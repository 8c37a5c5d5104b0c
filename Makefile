# `make demo` is the whole job in minutes; `make test` is what CI runs. Both build .venv by themselves.
PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check
# Few OpenMP threads per process unless told: several processes with many each spin for hours.
# A bench is alone, and its truths are computed in float64: it has all cores.
BENCH_THREADS := $(or $(OMP_NUM_THREADS),$(shell nproc))
export OMP_NUM_THREADS ?= 2

.PHONY: all demo test bench bench-compare check-gpu check docs clean
all: .venv/installed

.venv/installed: pyproject.toml setup.py constraints.txt
	@echo 'Installing into .venv, at the versions of constraints.txt: 3 to 6 minutes, once.'
	@$(PYTHON) -m venv .venv
	@echo '[1/3] PyTorch'
	@$(PIP) install -q -c constraints.txt torch
	@echo '[2/3] zeroi2v, with what training, export and the tests need'
	@$(PIP) install -q -c constraints.txt -e '.[train,export,dev]'
	@echo '[3/3] timm and open_clip, which the tests compare with'
	@$(PIP) install -q -c constraints.txt --no-deps torchvision timm open_clip_torch
	@touch $@
	@echo 'Installed. Next: `make demo` trains and merges a small model; `make test` runs all tests.'

demo: .venv/installed
	.venv/bin/python examples/demo.py

test: .venv/installed check
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests bench

# Times what can be timed here and renders the report: in .venv if there is one, else with PYTHON,
# which needs torch, triton, pytest, numpy, einops, safetensors, huggingface_hub, pyyaml and tqdm only.
# BENCH holds options of pytest: make bench BENCH='-k zero_cost'
bench bench-compare: export OMP_NUM_THREADS = $(BENCH_THREADS)
BENCH_PYTHON = PYTHONPATH=.:kernels $(if $(wildcard .venv/installed),.venv/bin/python,$(PYTHON))
bench:
	@status=0; $(BENCH_PYTHON) -m pytest bench --benchmark $(BENCH) || status=$$?; \
	$(BENCH_PYTHON) -m bench.report && exit $$status

# How many times the time of BASE each bench takes now: make bench-compare BASE=HEAD~1 BENCH='-k stdha'
bench-compare:
	@$(BENCH_PYTHON) -m bench.compare_commits $(or $(BASE),$(error set BASE, a commit)) $(BENCH)

# What only a CUDA GPU can show, in about 6 minutes; with .venv or PYTHON, as `bench`.
# CHECK holds its options: make check-gpu CHECK='--only kernels data'
check-gpu:
	@$(BENCH_PYTHON) -m bench.check_gpu $(CHECK)

# The site, in build/site: `python -m http.server -d build/site` shows it.
docs: .venv/installed
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	.venv/bin/mkdocs build --strict --quiet

check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf .venv demo build *.egg-info .pytest_cache .ruff_cache
