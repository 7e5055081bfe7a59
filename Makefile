# Everything is set up in this folder: packages in .venv, objects in build. `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)
TORCH := torch==2.13.0
# ON, OFF, or AUTO: with the CUDA part when nvcc is there. `make demo` wants it only where a GPU can run it.
CUDA ?= AUTO
BUILD_OPTIONS = --no-build-isolation --no-deps --config-settings=build-dir=build \
  --config-settings=cmake.define.DSM_TESTS=ON --config-settings=cmake.define.DSM_CUDA=$(CUDA) \
  --config-settings=cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=$(if $(CI),ON,OFF)

.PHONY: help build demo test cpp-test python-test package-test bench lint format sanitize gpu-build gpu-test gpu-sanitize gpu-bench \
  wheel clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 16

.venv/ready: requirements-dev.txt
	tools/system_packages.sh
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

build: .venv/ready ## set everything up and build; nothing else
	$(BIN)/python -m pip install --quiet --editable . $(BUILD_OPTIONS)

demo: CUDA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo AUTO || echo OFF)
demo: build ## train a small model on real text, write with it, make a report
	dsm demo

test: lint cpp-test python-test package-test ## everything that has to pass

cpp-test: build
	ctest --test-dir build --output-on-failure --parallel 2

python-test: build
	python -m pytest

package-test: build
	tools/package_test.sh

lint: build ## formatting, types, layers, generated text
	tools/lint.sh

format: .venv/ready ## rewrite the sources in the project's format
	tools/lint.sh --fix

bench: build ## operators side by side with what is installed
	dsm bench

sanitize: .venv/ready ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	cmake -S . -B build/sanitize -G Ninja -DDSM_SANITIZE=ON -DDSM_CUDA=OFF -DDSM_TORCH=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/sanitize
	ctest --test-dir build/sanitize --output-on-failure --parallel 2

gpu-build: .venv/ready ## build what `make gpu-test` runs on a machine that need not have a compiler or a network
	cmake -S . -B build-gpu -G Ninja -DDSM_CUDA=ON -DDSM_TESTS=OFF -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python
	cmake --build build-gpu

# What runs on a GPU machine, with its own Python and torch and the libraries in build-gpu; no compiler, no network.
GPU_ENVIRONMENT = DSM_LIBRARY_DIR=$(CURDIR)/build-gpu/lib PYTHONPATH=python
ON_GPU = $(GPU_ENVIRONMENT) $(PYTHON)

gpu-test: ## on a GPU machine: CUDA against the formulas and the CPU
	$(ON_GPU) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu-test: torch finds no GPU")'
	$(ON_GPU) -m pytest -p no:cacheprovider tests/python/gpu

gpu-sanitize: ## on a GPU machine: memory accesses, races and barriers of our kernels on small and awkward sizes
	for tool in memcheck racecheck synccheck; do
	  # racecheck does not know barriers at which some warps only arrive, which Hopper's kernels have
	  hopper=$$([ $$tool = racecheck ] || echo --kernel-name kns=sm90_kernel)
	  env PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(GPU_ENVIRONMENT) compute-sanitizer --tool $$tool --error-exitcode 1 \
	    --kernel-name kns=cuda_kernel $$hopper \
	    $(PYTHON) -m pytest -q -p no:cacheprovider -k '(matches and float32) or agrees_with_the_cpu' tests/python/gpu
	done

gpu-bench: ## on a GPU machine: operators side by side with what is installed
	$(ON_GPU) -m ds_flashdmla_moe.cli bench --device cuda --dtype bfloat16 --dtype float32

wheel: build ## dist/*.whl
	python -m pip wheel --quiet . --wheel-dir dist $(BUILD_OPTIONS)

clean: ## remove everything that make made
	rm -rf .venv build build-gpu dist demo_out
