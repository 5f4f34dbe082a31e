# Everything happens in .venv: it is created when absent, and installed into again only when the files that name the
# dependencies change.
PYTHON ?= python3
# pip compiles everything it installs, which takes longer than the rest. Instead, Python compiles what is imported, once;
# therefore it must be allowed to write what it compiled.
unexport PYTHONDONTWRITEBYTECODE
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# What `make demo` trains on: a folder of pictures of one subject, and what it is.
DEMO_SUBJECT ?= examples/subjects/noto_woman
DEMO_WORD ?= woman
DEMO_CONFIG ?= configs/sd-mini/attn2o-ffni.yaml

# Minutes that `make gpu` takes, and the Python that it runs in: one with torch for CUDA and the packages of `.[bench]`.
MINUTES ?= 9
GPU_PYTHON ?= $(PYTHON)

.PHONY: help demo test test-fast campaign lint bench gpu gpu-sd-mini clean

help:  ## list these targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 10

demo: .venv/runtime.stamp  ## train an adapter on a few pictures, sample with it, print where the pictures are
	$(PY) -m ldm demo --base $(DEMO_CONFIG) --data_root $(DEMO_SUBJECT) --class_word $(DEMO_WORD)

test: .venv/test.stamp  ## check the style and the floors, then run all tests
	.venv/bin/ruff check .
	.venv/bin/lint-imports --no-logo
	$(PY) -m pytest -n 2 --dist worksteal

test-fast: .venv/test.stamp  ## the same without the tests that are marked slow: a minute, for every commit
	.venv/bin/ruff check .
	.venv/bin/lint-imports --no-logo
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow"

campaign: .venv/test.stamp  ## attack the programs: hostile files, kills, full disks, signals; a table of what came of it
	$(PY) -m tests.campaign

lint: .venv/test.stamp  ## check the style and mend what can be mended; check the floors
	.venv/bin/ruff check --fix .
	.venv/bin/lint-imports --no-logo

bench: .venv/bench.stamp  ## measure against peers in the same run
	for name in load start train_step caches sampling scaling; do $(PY) benchmarks/$$name.py --repeats 2 || exit 1; done
	$(PY) benchmarks/switches.py --repeats 2 --switches "freed memory kept" "library convolutions"
	$(PY) benchmarks/train_step.py --precision bf16 --repeats 2

gpu:  ## measure this machine's NVIDIA GPU in MINUTES=9, with what is installed: benchmarks/results, docs/benchmarks.md
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py --minutes $(MINUTES)
	$(GPU_PYTHON) benchmarks/gpu.py --tables

# A machine with a GPU needs no more than torch, what `ldm` imports and the packed pictures; repeat it to go on.
gpu-sd-mini:  ## train SD-mini further on one GPU from build/packed.tar.gz, for eight minutes a call; evaluate and pack
	PYTHONPATH=. $(GPU_PYTHON) -m scripts.sd_mini.gpu --seconds $(or $(SECONDS),420) --autoencoder_seconds 60 --out build/gpu

clean:  ## remove the environment and everything that tests and builds leave; logs and outputs stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "error: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo absent); try make PYTHON=python3.11"; \
		exit 2; }
	$(PYTHON) -m venv .venv

.venv/runtime.stamp: setup.py constraints.txt | .venv/bin/pip
	$(PIP) -e .
	@touch $@

.venv/test.stamp: setup.py constraints.txt requirements-vq.txt | .venv/bin/pip
	$(PIP) -e '.[test]'
	$(PIP) --no-deps -r requirements-vq.txt
	@touch $@ .venv/runtime.stamp

.venv/bench.stamp: setup.py constraints.txt | .venv/bin/pip
	$(PIP) -e '.[bench]'
	@touch $@ .venv/runtime.stamp
