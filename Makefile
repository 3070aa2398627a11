# Muster: `make help` explains every target. Everything lives in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all test-gpu cluster-tools lint chaos bench-layouts bench-survival bench-saves bench-torn bench-cycles bench-guard bench-every-step bench-snapshot bench-layer bench-step bench-before bench-exchange bench-scale bench-checkpoint bench docs clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY) ## make .venv and install Muster with the tested versions (again: does nothing)

# torch comes first, by itself: later packages then find it and ask for no other build. Byte code is made at the end,
# on all cores, and not by pip, on one; a package may hold files of another Python, which nobody imports.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Muster needs Python 3.11 or newer: make setup PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -q -q -j 0 $(VENV)/lib || true
	touch $(READY)

train: setup ## the main job: train a Mixture-of-Experts on two processes (ARGS="train.steps=600" changes it)
	$(BIN)/muster train experiment=quickstart $(ARGS)

test: setup ## what must pass before a change lands, three at a time (tests/conftest.py); no GPU needed
	$(BIN)/python -m pytest -n 3 -m "not long" $(ARGS)

test-all: setup ## the same and the long tests: repetitions and variations (ARGS="-m long": these alone)
	$(BIN)/python -m pytest -n 3 $(ARGS)

test-gpu: setup ## tests that need a CUDA device
	$(BIN)/python -m pytest -o addopts='' -m gpu tests/gpu $(ARGS)

cluster-tools: ## Debian packages for the tests with several nodes (as root); without them those tests are skipped
	@missing=""; for tool in ip:iproute2 sshd:openssh-server ssh:openssh-client pdsh:pdsh slurmctld:slurmctld \
	  slurmd:slurmd sbatch:slurm-client munged:munge etcd:etcd-server; do \
	  command -v $${tool%%:*} >/dev/null || missing="$$missing $${tool##*:}"; done; \
	if [ -n "$$missing" ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing; fi

lint: setup ## ruff (rules and format), mypy, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-torn: setup ## kill saves at every system call, damage checkpoints everywhere, write bench/results/torn.md
	$(BIN)/python -m bench.torn $(ARGS)

bench-cycles: setup ## kill and resume a small run again and again (ARGS="--cycles 1000"; resumable)
	$(BIN)/python -m bench.cycles $(ARGS)

chaos: setup ## all 419 interruptions of Llama 3 in one run, write bench/results/chaos_llama3.md (hours; resumable)
	$(BIN)/python -m bench.chaos $(ARGS)

bench-layouts: setup ## train every layout with the quickstart's budget, write bench/results/layouts.md (resumable)
	$(BIN)/python -m bench.layouts $(ARGS)

BENCH := .venv-bench/bin
.venv-bench/.ready: pyproject.toml constraints.txt
	test -x $(BENCH)/python || $(PYTHON) -m venv .venv-bench
	$(BENCH)/python -m pip install --quiet --constraint constraints.txt torch
	$(BENCH)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

bench-survival: .venv-bench/.ready ## recovery from kill -9 and SIGSTOP, Muster and its peers in turn, write bench/results/survival.md
	$(BENCH)/python -m bench.survival $(ARGS)

bench-saves: setup ## what asynchronous saves cost, Muster and DCP in turn, write bench/results/saves.md
	$(BIN)/python -m bench.saves $(ARGS)

bench-guard: setup ## what the guards cost: steps with and without them in turn (ARGS="--rounds 40")
	$(BIN)/python -m bench.guard $(ARGS)

bench-every-step: setup ## what a snapshot after every step costs the quickstart, write bench/results/every_step.md
	$(BIN)/python -m bench.every_step $(ARGS)

bench-snapshot: setup ## the stall of a snapshot in memory beside a plain copy of the same bytes
	$(BIN)/python -m bench.snapshot $(ARGS)

# As Muster's own workers set it (trainer/process.py); SPIN= leaves OpenMP's threads as they are.
SPIN ?= GOMP_SPINCOUNT=10000

bench-layer: setup ## one MoE layer, Muster, peers and floors in turn, write bench/results/layer.md (ARGS="--shape mixtral")
	$(SPIN) $(BIN)/python -m bench.layer $(ARGS)

bench-step: setup ## a whole training step, Muster, peers and the floor in turn, write bench/results/step.md (ARGS="--dtype fp32")
	$(SPIN) $(BIN)/python -m bench.step $(ARGS)

bench-before: setup ## a step of an older version and of this one in turn, with a picture (ARGS="--rev COMMIT")
	$(BIN)/python -m bench.before $(ARGS)

bench-exchange: setup ## the MoE layer over 2 and 4 processes beside its products and bytes, write bench/results/exchange.md
	$(BIN)/python -m bench.exchange $(ARGS)

bench-scale: setup ## 1 to 8 processes, and what 16,384 ranks cost each to set up, write bench/results/scale.md
	$(BIN)/python -m bench.scale $(ARGS)

bench-checkpoint: setup ## one save of 1 GiB: Muster, torch.save, DCP and the disk in turn, write bench/results/checkpoint.md
	$(BIN)/python -m bench.checkpoint $(ARGS)

bench: bench-layer bench-step bench-exchange bench-scale bench-checkpoint bench-saves ## all that is about speed (an hour)

docs: setup ## write anew what the code knows: metrics.md, configuration.md, layouts.md, README's figures
	$(BIN)/python -m trainer.metrics.schema > docs/metrics.md
	$(BIN)/python -m trainer.reference > docs/configuration.md
	$(BIN)/python -m trainer.layouts docs/layouts.md
	$(BIN)/python -m docs.draw_layouts
	$(BIN)/python -m bench.readme

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .venv-bench .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
