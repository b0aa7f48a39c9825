# Two commands for users: `make quickstart` and `make test`. Each makes .venv when it is missing or older than
# pyproject.toml or constraints.txt. pip and not uv: uv does not look where pip is configured to look.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: quickstart test test-all lint clean

quickstart: $(STAMP)
	$(BIN)/quadmix run pipelines/recipes/quickstart.yaml --out runs/quickstart

test: $(STAMP) lint
	$(BIN)/python -m pytest

test-all: $(STAMP) lint
	QUADMIX_EXAMPLES=10000 $(BIN)/python -m pytest -m ""

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) runs/quickstart build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "error: $$($(PYTHON) --version) found; give Python 3.11 to 3.13, as in: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
