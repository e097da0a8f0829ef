# Two commands do everything on a fresh machine: `make bench` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := 'torch==2.11.*' 'numpy<2.4'
PEERS := $(VENV)/.peers

.PHONY: help install bench bench-peers plots figures docs-numbers kernel-report gpu-check tune test test-oldest lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED)  ## make the environment

$(INSTALLED): pyproject.toml setup.py $(wildcard kernels/cpu/src/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -e '.[dev]' $(TORCH)
	touch $@

bench: $(INSTALLED)  ## fast against naive: parity, speed, memory, plots, a report (about five minutes)
	$(BIN)/fastdense bench

$(PEERS): $(INSTALLED)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -e '.[peers]'
	touch $@

bench-peers: $(PEERS)  ## beside torch.compile, OpenVINO, ONNX Runtime, timm, MONAI (a quarter of an hour)
	$(BIN)/fastdense bench --suite peers

plots: $(INSTALLED)  ## draw the plots again from the saved results
	$(BIN)/python -m fastdense.benchmarks.plots

figures: $(INSTALLED)  ## draw the figures of docs/
	$(BIN)/python -m fastdense.benchmarks.figures

docs-numbers: $(INSTALLED)  ## write the numbers of README and docs/ anew, from the saved results
	$(BIN)/python -m fastdense.benchmarks.numbers

kernel-report: $(INSTALLED)  ## compile the Triton kernels for four GPU generations: registers, spills, predicted time
	$(BIN)/python -m fastdense.benchmarks.kernel_report

gpu-check: $(INSTALLED)  ## on a GPU: parity, time over floor, networks beside eager and torch.compile; resumable
	$(BIN)/python -m fastdense.benchmarks.gpu_check

tune: $(INSTALLED)  ## on a GPU: write its kernels/tuned/<gpu>.json
	$(BIN)/python -m fastdense.benchmarks.tune

test: $(INSTALLED)  ## everything that can run on this machine
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n 2 --dist loadfile

test-oldest:  ## the same with the oldest torch that is supported, in an environment of its own
	$(MAKE) test VENV=$(VENV)-oldest TORCH="$(OLDEST)"

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and everything made
	rm -rf $(VENV) $(VENV)-oldest build dist *.egg-info out
