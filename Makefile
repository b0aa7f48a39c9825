# Two commands for users: `make quickstart` and `make test`. Each makes .venv when it is missing or older than
# pyproject.toml or constraints.txt. pip and not uv: uv does not look where pip is configured to look.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: quickstart test test-all lint fuzz audit clean

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

# Each reader of what others may have written gets hostile input for SECONDS; fuzz/driver.py says what a finding is.
fuzz: SECONDS ?= 60
fuzz: $(STAMP)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	@found=; for target in recipe manifest index; do \
	  $(BIN)/python fuzz/$$target.py --seconds $(SECONDS) || found="$$found $$target"; \
	done; test -z "$$found" || { echo "error: findings of$$found; see fuzz/findings/"; exit 1; }

# Known advisories of every package in .venv, from PyPI's database: needs the network. Exit code 1 with the list.
audit: $(STAMP)
	@$(BIN)/python -c 'import pip_audit' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[audit]'
	$(BIN)/python scripts/audit.py

clean:
	rm -rf $(VENV) runs/quickstart build dist *.egg-info .pytest_cache .ruff_cache .hypothesis fuzz/findings

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "error: $$($(PYTHON) --version) found; give Python 3.11 to 3.13, as in: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
