# make demo   the environment, then the main job on the embedded default (CPU, minutes)
# make test   the tests        make lint   format, lint, types
# make soak   long repeats of what make test runs a short version of; docs/log.md has the last results
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test soak lint env

env: $(VENV)/.ready

# torch comes first and by itself, so that what follows finds it there. A laptop without a GPU can spare itself several
# GB of CUDA libraries with TORCH_INDEX=https://download.pytorch.org/whl/cpu
PIP_INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP_INSTALL) --editable '.[test]'
	@touch $@

demo: env
	$(BIN)/python launch/run.py recipes/tiny/arithmetic_grpo.yaml

test: env
	$(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term-missing:skip-covered

soak: env
	$(BIN)/python -m pytest -m soak --timeout 3600 --durations 0

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy launch/run.py launch/grpo.py launch/sft.py
