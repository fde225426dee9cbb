# Three commands: `make pretrain`, `make finetune` and `make test`. PIP_ARGS is handed to pip, e.g. an index of CPU wheels.
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
PROCESSES := $(if $(filter 1,$(GPUS)),1,2)
# DeepSpeed's launcher and every rank would look for accelerators and warn that there is none.
export DS_ACCELERATOR ?= $(if $(filter 0,$(GPUS)),cpu,)
ifeq ($(DS_ACCELERATOR),)
unexport DS_ACCELERATOR
endif

.PHONY: setup pretrain finetune test test-system test-faults bench check clean

setup: .venv/installed .venv/kernels

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable .
	@touch $@

# The fused attention of CPUs: a minute of g++ where there is one; without, a line that says so.
.venv/kernels: .venv/installed $(wildcard swinv2_scale/models/ops/csrc/*)
	$(BIN)/swinv2-scale kernels build --optional
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable '.[dev]'
	@touch $@

pretrain: setup
	$(BIN)/deepspeed -q --num_gpus $(PROCESSES) launch/pretrain.py --config configs/quickstart/simmim.yaml $(ARGS)

finetune: setup
ifeq ($(findstring init_from,$(ARGS)),)
	@test -d runs/quickstart-simmim/checkpoints || \
		{ echo "make finetune goes on from what make pretrain makes: that comes first, about 3 minutes" && $(MAKE) pretrain; }
endif
	$(BIN)/deepspeed -q --num_gpus $(PROCESSES) launch/finetune.py --config configs/quickstart/finetune.yaml $(ARGS)

test: .venv/installed-dev .venv/kernels
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# On a real Slurm, real ssh hosts and network namespaces of this machine, and the longest of the other tests; root's
# apt-get installs what is missing. One after another: DeepSpeed ends a job over pdsh by pkill, and so ends the launchers
# of all others on this machine.
test-system: .venv/installed-dev
	tests/system/install.sh
	$(BIN)/python -m pytest -q -m system tests $(ARGS)

# What takes too long for every change: real kills at every step, a chain of fifty, a crash after every file operation
# of a save, cut networks. Under an hour; docs/resume.md says what it printed.
test-faults: .venv/installed-dev
	$(BIN)/python -m pytest -q -m sweep tests $(ARGS)
	$(BIN)/python benchmarks/crashes.py
	$(BIN)/python benchmarks/kills.py every-step
	$(BIN)/python benchmarks/kills.py chain

# Speed on this machine's CPU beside timm, Hugging Face and torchvision; under 20 minutes, with nothing else running.
# Microsoft's code too: make bench ARGS='--microsoft CHECKOUT'.
bench: .venv/installed-dev .venv/kernels
	$(BIN)/python benchmarks/suite.py $(ARGS)

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/contract

clean:
	rm -rf .venv build *.egg-info
