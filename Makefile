# Two commands: `make demo` and `make test`. Each sets up everything it needs in .venv; nothing else is to be done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check format mutants bench wheel clean

demo: $(VENV)/ready
	$(BIN)/qkv demo

test: check
	$(BIN)/python -m pytest -q

check: $(VENV)/ready
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

mutants: $(VENV)/ready
	$(BIN)/python tests/mutants.py

bench: $(VENV)/ready
	$(BIN)/python benchmarks/spine.py
	$(BIN)/python benchmarks/kernel.py

wheel: $(VENV)/ready
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) dist

$(VENV)/ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/src/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
