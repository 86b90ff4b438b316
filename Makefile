# Everything here runs from a fresh clone with Python 3.10 or newer, make and a package index.
#
#   make demo        back up a sample database (or DATABASE_URL) through Dagster, and show what is in storage
#   make demo-stop   stop the demo's server and delete the demo
#   make test        all tests, two files at a time; ARGS="-k manifest -x" goes to pytest
#   make check       lint, format, types, layers, and whether Dagster can load the definitions
#   make bench       the benchmarks; the table and the plot land in benchmarks/
#   make venv        the environment alone, in .venv
#
# PYTHON=/path/to/python3.12 chooses the interpreter; otherwise the newest found is taken.

BIN := .venv/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Compiled at first use rather than by pip, which takes longer and compiles what nobody imports.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo demo-stop test check bench venv
.DELETE_ON_ERROR:

demo: .venv/embedded
	@$(BIN)/python demo/run.py

demo-stop: .venv/embedded
	@$(BIN)/python demo/run.py --stop

test: .venv/dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/dagster definitions validate -m kanbu_backup_dagster.definitions

bench: .venv/bench
	$(BIN)/python -m benchmarks $(ARGS)

venv: .venv/dev

# The stamps: .venv/made once pip is there; the others once the extra of that name, which brings "embedded", is installed.
.venv/made:
	@tools/make-venv.sh $(PYTHON)
	@touch $@

.venv/embedded .venv/dev .venv/bench: .venv/made pyproject.toml
	@echo "Installing the project with what \"$(@F)\" needs into .venv; the first time this takes half a minute."
	@$(BIN)/pip install -qq --no-compile --editable '.[$(@F)]'
	@touch $@ .venv/embedded
