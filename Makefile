# Two commands on a fresh machine: `make demo` and `make test`. `make` alone lists all of them.
# Everything is installed into this folder (.venv, and .uv where uv itself is missing); nothing outside it is touched
# except uv's download cache. Paths are relative, so a folder with a space in its name works.
#   PYTHON=python3.12      makes .venv from this interpreter (default: any in range that uv finds)
#   PYTEST_ARGS="-k text"  is passed on to pytest; `--slow` adds the slow tests
#   WORKERS=4              processes that `make test` runs, each on one core and in up to 5 GB of memory
#   LAB_ARGS="--no-browser" is passed on to JupyterLab

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test faults lab lint outputs install install-test clean distclean

# The range that pyproject.toml requires; a name or a path takes its place.
PYTHON ?= >=3.11,<3.14
PYTEST_ARGS ?=
WORKERS ?= 2
LAB_ARGS ?=

FAULTS := tests/faults tests/runs tests/test_run_lock.py tests/test_faults.py tests/train/test_checkpoint*.py
RECORD := benchmarks/reliability.jsonl

NOTEBOOK := notebooks/01_text.ipynb
RECIPE := params/text_quick.yaml
# what the notebook that compares runs has to look at when its outputs are stored
SWEEP := params/sweeps/text_quick.yaml

# Executed in a copy, so that its run is called `text` and no run of yours is touched. Kept: tags, kernel and outputs, the
# lines of a stream in one piece. Left out: times, Python version, widgets, cell metadata of editors.
STORE_OUTPUTS := --to notebook --execute --log-level=WARN --KernelManager.transport_encryption=auto \
	--ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False \
	--NotebookExporter.preprocessors=nbconvert.preprocessors.CoalesceStreamsPreprocessor \
	--CoalesceStreamsPreprocessor.enabled=True --ClearMetadataPreprocessor.enabled=True \
	--ClearMetadataPreprocessor.preserve_cell_metadata_mask="{'tags'}" \
	--ClearMetadataPreprocessor.preserve_nb_metadata_mask="{('language_info', 'name'), 'kernelspec'}"

# An environment of another project, or paths of another interpreter, must not leak into this one.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME

# Downloads are cached in the home folder as usual; where that cannot be written, in .cache beside this file.
ifeq ($(origin UV_CACHE_DIR),undefined)
UV_CACHE_DIR := $(shell dir="$${XDG_CACHE_HOME:-$$HOME/.cache}/uv"; \
	mkdir -p "$$dir" 2>/dev/null && test -w "$$dir" && echo "$$dir" || echo "$(CURDIR)/.cache/uv")
endif
export UV_CACHE_DIR

# uv from the PATH when it really starts (a version manager's shim may not), else the one in .uv.
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .uv/bin/uv)
UV_FILE := $(filter .uv/bin/uv,$(UV))

# Commands in an environment start with its absolute path, so after the folder was moved or copied they are made anew.
$(shell for env in .venv .uv; do \
	test ! -f $$env/.folder || test "$$(cat $$env/.folder)" = "$$(pwd -P)" || rm -rf $$env; done)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

demo: .venv/.installed ## fine-tune the built-in tiny Gemma 3n on a CPU and show what it learned (minutes)
	@echo "forgekit: running $(NOTEBOOK) with $(RECIPE)"
	@.venv/bin/python -m forgekit run $(NOTEBOOK) --recipe $(RECIPE)

test: .venv/.installed-test ## run the default tests (CPU, minutes); PYTEST_ARGS=--slow adds the slow ones
	@echo "forgekit: running the tests"
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

faults: .venv/.installed-test ## break runs at every step and in every way, and write the README's table (up to an hour); PYTEST_ARGS=--only-missing goes on
	@echo "forgekit: running the fault suite"
	@.venv/bin/python -m pytest $(FAULTS) --faults --slow --record $(RECORD) $(PYTEST_ARGS)
	@.venv/bin/python -m benchmarks.reliability $(RECORD)

lab: .venv/.installed ## open JupyterLab on 127.0.0.1 with this environment
	@.venv/bin/python -m forgekit lab $(LAB_ARGS)

lint: .venv/.installed-test ## check code and notebooks: ruff, formatting, types
	@echo "forgekit: ruff check"
	@.venv/bin/ruff check
	@echo "forgekit: ruff format --check"
	@.venv/bin/ruff format --check
	@echo "forgekit: mypy"
	@.venv/bin/mypy

outputs: .venv/.installed ## execute the notebook anew and store its outputs in it (minutes); look at the difference, then commit
	@rm -rf build/outputs
	@.venv/bin/python -m forgekit init build/outputs >/dev/null
	@case "$(NOTEBOOK)" in */04_*) cd build/outputs && FORGEKIT_RUNS= ../../.venv/bin/python -m forgekit sweep $(SWEEP);; esac
	@echo "forgekit: executing $(NOTEBOOK)"
	@FORGEKIT_RUNS= FORGEKIT_RUN=text .venv/bin/python -m nbconvert $(STORE_OUTPUTS) --output-dir notebooks build/outputs/$(NOTEBOOK)

install: .venv/.installed ## install forgekit and what it needs into .venv
	@:

install-test: .venv/.installed-test ## install also what the tests and checks need
	@:

clean: ## remove builds and caches; keep the environment and the runs
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	@find . \( -name .venv -o -name .uv -o -name .cache -o -name .git -o -name runs \) -prune \
		-o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environment too (.venv, .uv, .cache); keep the runs
	@rm -rf .venv .uv .cache uv.lock

# Stamps: an installed tree is left alone (and needs no network) until pyproject.toml changes.
.venv/.installed: pyproject.toml | .venv/bin/python $(UV_FILE)
	@$(call install_package,.,forgekit and what it needs)
	@touch $@

.venv/.installed-test: pyproject.toml | .venv/bin/python $(UV_FILE)
	@$(call install_package,.[test],forgekit and what it and its tests need)
	@touch .venv/.installed $@

define install_package
echo "forgekit: installing $(2) (the first time about 3.5 GB are downloaded)"; \
test -t 2 || quiet=--quiet; \
$(UV) pip install $$quiet --python .venv/bin/python --editable "$(1)" || \
	{ echo "forgekit: the installation failed; the reason stands above." >&2; exit 1; }
endef

# uv first looks for a Python in range on this machine; where there is none it may download one, into .cache.
.venv/bin/python: | $(UV_FILE)
	@echo "forgekit: creating .venv"
	@why="the reason stands above"; \
	python="$$($(UV) python find --no-project --system "$(PYTHON)" 2>/dev/null)" || { \
		echo "forgekit: found no interpreter for $(PYTHON); trying to download one"; \
		why="install Python 3.11, 3.12 or 3.13, or name one with PYTHON=/path/to/python3"; \
		python="$(PYTHON)"; \
		export UV_PYTHON_INSTALL_DIR="$${UV_PYTHON_INSTALL_DIR:-$$PWD/.cache/python}"; \
		exec 2>/dev/null; }; \
	$(UV) venv --quiet --no-project --clear --python "$$python" .venv || { \
		echo "forgekit: .venv could not be created: $$why."; exit 1; }
	@pwd -P > .venv/.folder

# A virtual environment of its own, because a system Python that is managed by the distribution refuses `pip install`.
.uv/bin/uv:
	@echo "forgekit: uv was not found; installing it into .uv"
	@python3 -m venv .uv || { \
		echo "forgekit: 'python3 -m venv' does not work here; install it (Debian, Ubuntu: apt-get install python3-venv), or install uv." >&2; \
		rm -rf .uv; exit 1; }
	@.uv/bin/python -m pip install --quiet --disable-pip-version-check --cache-dir .cache/pip uv
	@pwd -P > .uv/.folder
