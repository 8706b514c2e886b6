# make demo   the environment, then the main job on the embedded default (CPU, minutes)
# make test   the tests        make lint   format, lint, types
# make soak   long repeats of what make test runs a short version of; docs/log.md has the last results
# make cpu-server   vLLM's CPU build in an environment of its own, for the tests against a real policy server
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CPU_SERVER ?= .venv-cpu-server
WORKERS ?= 3

.PHONY: demo test soak lint env cpu-server

env: $(VENV)/.ready

# torch comes first and by itself, so that what follows finds it there. A laptop without a GPU can spare itself several
# GB of CUDA libraries with TORCH_INDEX=https://download.pytorch.org/whl/cpu
PIP_INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP_INSTALL) --editable '.[test]'
	@touch $@

# It sees the packages of the first environment and adds its own, some in other versions, which there would be in
# the way.
PACKAGES = 'import sysconfig; print(sysconfig.get_path("purelib"))'
cpu-server: $(CPU_SERVER)/.ready
$(CPU_SERVER)/.ready: $(VENV)/.ready src/r1zero/serving/cpu_build.py
	$(PYTHON) -m venv $(CPU_SERVER)
	printf 'import site; site.addsitedir("%s")\n' "$$($(BIN)/python -c $(PACKAGES))" \
		> "$$($(CPU_SERVER)/bin/python -c $(PACKAGES))/base.pth"
	$(CPU_SERVER)/bin/python -m r1zero.serving.cpu_build --constraint constraints.txt
	@touch $@

demo: env
	$(BIN)/python launch/run.py recipes/tiny/arithmetic_grpo.yaml

# The tests against a real policy server run where there is one.
REAL_SERVER = $(if $(wildcard $(CPU_SERVER)/.ready),R1ZERO_CPU_SERVER_PYTHON=$(abspath $(CPU_SERVER))/bin/python)
COVERAGE = --cov --cov-append --cov-report=
test: env
	$(BIN)/coverage erase
	$(REAL_SERVER) $(BIN)/python -m pytest -m 'not soak and not alone' -n $(WORKERS) --dist loadgroup $(COVERAGE); \
	others=$$?; $(BIN)/python -m pytest -m 'alone and not soak' $(COVERAGE) -q && exit $$others
	$(BIN)/coverage report --show-missing --skip-covered

soak: env
	$(REAL_SERVER) $(BIN)/python -m pytest -m soak --timeout 3600 --durations 0

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy launch/run.py launch/grpo.py launch/sft.py launch/evaluate.py launch/report.py
