# Everything needs Python 3.11 or newer and nothing else; the first target makes its own environment in .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: install quickstart experiment test test-slow lint clean

install: .venv/installed

# torch first and by its own version, so that nothing pulls another build of it.
.venv/installed: pyproject.toml
	@started=$$(date +%s); set -e; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlhub needs Python 3.11 or newer, this is " + sys.version.split()[0])'; \
	echo "making the environment in .venv (a few minutes)"; \
	$(PYTHON) -m venv .venv; \
	$(BIN)/pip install --quiet --disable-pip-version-check setuptools wheel $(TORCH); \
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'; \
	touch $@; \
	echo "installed in $$(( $$(date +%s) - started )) s"

quickstart: install
	@started=$$(date +%s); \
	$(BIN)/rlhub train recipes/quickstart.yaml && \
	echo "ran in $$(( $$(date +%s) - started )) s"

# Three seeds of the quickstart with its two controls.
experiment: install
	$(BIN)/rlhub experiment recipes/experiments/quickstart.yaml

test: install
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: install
	$(BIN)/pytest -m "slow and not gpu" --timeout 3000

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf .venv build dist *.egg-info
