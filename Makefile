# The same commands on a laptop and in CI.  Needs Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test check format clean

setup: .venv/.ready

# Done again only when the metadata or the pins change.
.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Vitrail needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 setup") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/vitrail train digits-vit --train.output runs/demo --train.overwrite true

# One thread for each of the two workers: more would wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs build
