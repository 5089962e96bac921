PYTHON ?= python3
VENV := .venv
GPU_VENV := .venv-gpu
SECONDS ?= 560
GPU_OUT ?= .cache/gpu
REPA_OFFICIAL ?= $(wildcard .released)
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -p no:benchmark -n 2 --dist loadgroup --durations=15

# Compiled code is shared by the test workers and kept from run to run.
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor
export TRITON_CACHE_DIR := $(CURDIR)/.cache/triton
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help $(VENV) lint test test-full docs smoke-full chaos demo analyse bench $(GPU_VENV) csrc-gpu rehearse \
	gpu gpu-test gpu-home clean

help: ## list the targets
	@grep -hE '^[a-z$$][A-Za-z$$() _-]*:.*## ' $(MAKEFILE_LIST) \
		| sed 's/$$(VENV)/$(VENV)/; s/$$(GPU_VENV)/$(GPU_VENV)/' \
		| awk -F ':.*## ' '{ printf "%s\n    %s\n", $$1, $$2 }'

$(VENV): $(VENV)/.installed ## create the virtual environment (PYTHON >= 3.11) and install into it

$(VENV)/.installed: constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit("PYTHON=$(PYTHON): need >= 3.11, got " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

# The CUDA library of csrc/; where it cannot be built, setup.py says why in one line.
$(VENV)/.csrc: $(VENV)/.installed setup.py $(wildcard csrc/*/*.cu*)
	@$(VENV)/bin/python -W ignore setup.py -q build_ext --inplace
	@touch $@

lint: $(VENV)/.installed ## ruff check and ruff format --check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test: $(VENV)/.csrc ## the fast tier of the tests that need no GPU; four minutes on two cores
	@$(PYTEST) -m "not gpu and not smoke_full"

test-full: $(VENV)/.csrc ## all tests that need no GPU, with every case of their grids; twenty minutes
	@$(PYTEST) --full -m "not gpu and not smoke_full"

docs: $(VENV)/.installed ## build the documentation into site/; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build
	@echo site/index.html

smoke-full: $(VENV)/.installed ## SiT-XL/2 with DINOv2-B: a step, save, resume, sample; 22 GiB of memory
	$(VENV)/bin/python -m pytest -p no:benchmark -m smoke_full --durations=1 tests/train/test_smoke.py

chaos: $(VENV)/.installed ## let runs on two processes suffer 100 faults and compare them with one left alone; half an hour
	$(VENV)/bin/python -m benchmarks.faults.chaos --faults 100

demo: $(VENV)/.installed ## train on the bundled digits on a CPU, or go on with it, then evaluate
	$(VENV)/bin/python train.py --preset digits --output-dir runs --exp-name demo --resume auto
	$(VENV)/bin/python -m repa_fast.eval.digits runs/demo

analyse: $(VENV)/.installed ## samples, scores, probing and CKNNA of the demo's run
	$(VENV)/bin/python -m repa_fast sample --ckpt runs/demo --cfg-scale 2.5
	$(VENV)/bin/python -m repa_fast strip --ckpt runs/demo --cfg-scale 2.5
	$(VENV)/bin/python -m repa_fast sweep --ckpt runs/demo --all-steps --cfg-scale 2.5 --num-fid-samples 250 \
		--dataset digits --features digits-judge
	$(VENV)/bin/python -m repa_fast probe --ckpt runs/demo
	$(VENV)/bin/python -m repa_fast cknna --ckpt runs/demo --all-steps

bench: $(VENV)/.installed ## kernel benchmarks (pytest-benchmark)
	$(VENV)/bin/python -m pytest benchmarks/kernels --benchmark-only

# What a GPU machine brings of its own: torch 2.11 and Triton 3.6 on Python 3.12, no tyro, diffusers or pylance.
GPU_PACKAGES := torch==2.11.0 torchvision==0.26.0 timm pytest pytest-benchmark pytest-xdist rich safetensors scipy \
	scikit-learn scikit-image matplotlib tensorboard pyarrow ninja setuptools wheel

# An environment that is there already gets what it lacks.
GPU_PYTHON = $(or $(wildcard $(GPU_VENV)/bin/python),$(PYTHON))

$(GPU_VENV): $(GPU_VENV)/.installed ## the packages of a GPU machine, to rehearse with (PYTHON=python3.12)

$(GPU_VENV)/.installed:
	@$(GPU_PYTHON) -c 'import sys; sys.exit("$(GPU_PYTHON): $(GPU_VENV) needs Python 3.12 (PYTHON=...), got " + sys.version.split()[0] if sys.version_info[:2] != (3, 12) else 0)'
	test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet $(GPU_PACKAGES)
	@touch $@

csrc-gpu: $(GPU_VENV)/.installed ## build csrc for a Hopper GPU, to be carried to one
	@REPA_FAST_CUDA=1 REPA_FAST_CUDA_ARCHS=9.0 $(GPU_VENV)/bin/python -W ignore setup.py -q build_ext --inplace

rehearse: $(GPU_VENV)/.installed ## every item of the GPU queue on a pretended H100; REPA_OFFICIAL=released code
	@rm -rf .cache/rehearsal
	REPA_OFFICIAL=$(REPA_OFFICIAL) $(GPU_VENV)/bin/python -m benchmarks.gpu --pretended --seconds 7200 \
		--out .cache/rehearsal

# On a GPU machine PYTHON is that machine's own.
gpu: ## what a GPU has to measure, in order of value, within SECONDS; results in GPU_OUT/gpu.tar.gz
	$(PYTHON) -m benchmarks.gpu --seconds $(SECONDS) --out $(GPU_OUT)

gpu-test: ## the tests marked gpu
	$(PYTHON) -m pytest --full -m gpu tests

gpu-home: $(VENV)/.installed ## bring measured rows into the checkout (TAR=.../gpu.tar.gz)
	$(VENV)/bin/python -m benchmarks.gpu.home $(TAR)

clean: ## remove build products and caches (not the venv, not runs)
	rm -rf build dist site *.egg-info .cache .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
