# Needs Python 3.10 or newer and make; everything else is installed into .venv.
#
#   make demo   fine-tune SevenNet-0 on the ethylene carbonate example
#   make test   lint, types, and all tests in three environments: SevenNet, NequIP and
#               CHGNet; MACE, which cannot share theirs; and none of them; the report
#               in Chromium, where there is one
#   make lint   lint and types alone
#   make clean  remove the environments, caches and the demo's run folder

PYTHON ?= python3
# The tests' models and the example's molecule are small: on a busy machine more
# threads only make them wait for each other. Give another number if yours is idle.
OMP_NUM_THREADS ?= 1

PIP = -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST = -m pytest -q --durations=10
THREADS = OMP_NUM_THREADS=$(OMP_NUM_THREADS)
EXAMPLE = examples/ethylene_carbonate/config.yaml

all: test

# torch comes first and pinned: resolved together with the rest, an open requirement
# may take a newer one and the CUDA packages it brings.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) torch
	.venv/bin/python $(PIP) -e ".[sevennet,nequip,chgnet,dev,browser]"
	touch $@

.venv-mace/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-mace
	.venv-mace/bin/python $(PIP) torch
	.venv-mace/bin/python $(PIP) -e ".[mace,dev]"
	.venv-mace/bin/python $(PIP) --no-deps --target .venv-mace/cueq \
	cuequivariance cuequivariance-torch
	touch $@

.venv-core/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-core
	.venv-core/bin/python $(PIP) torch
	.venv-core/bin/python $(PIP) -e . hypothesis pytest
	touch $@

# --resume starts a new run, continues a partial one and shows a finished one.
demo: .venv/installed
	$(THREADS) .venv/bin/pathtune finetune $(EXAMPLE) --output demo-run --resume

test: lint test-all test-browser test-mace test-core

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test-all: .venv/installed
	$(THREADS) .venv/bin/python $(PYTEST) --ignore tests/browser

# The report in a real Chromium. Without it, or without npm for the accessibility
# checker, the tests say what is missing and are skipped; PATHTUNE_REQUIRE_BROWSER=1
# makes that an error.
test-browser: .venv/installed
	-$(MAKE) .cache/axe/package/axe.min.js
	$(THREADS) .venv/bin/python $(PYTEST) tests/browser

.cache/axe/package/axe.min.js:
	mkdir -p .cache/axe
	cd .cache/axe && npm pack --silent axe-core@4.14.1 && tar -xzf axe-core-*.tgz
	touch $@

# MACE builds other models where cuequivariance is installed, so it is beside.
test-mace: .venv-mace/installed
	$(THREADS) .venv-mace/bin/python $(PYTEST) tests/backends tests/contract tests/e2e
	$(THREADS) PYTHONPATH=.venv-mace/cueq .venv-mace/bin/python $(PYTEST) \
	tests/backends/test_acceleration.py

# The same unit tests where no backend can be imported.
test-core: .venv-core/installed
	.venv-core/bin/python -c "from importlib.util import find_spec as f; \
	assert not any(map(f, ['sevenn', 'mace', 'nequip', 'chgnet', 'e3nn'])), 'a backend is installed'"
	$(THREADS) .venv-core/bin/python $(PYTEST) tests/unit tests/meta

clean:
	rm -rf .cache .venv .venv-mace .venv-core demo-run .pytest_cache .ruff_cache .mypy_cache .hypothesis

.PHONY: all demo test lint test-all test-browser test-mace test-core clean
