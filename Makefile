# Two commands on a fresh machine with Python (>= 3.11) and make:  make demo   make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2

.PHONY: demo test test-slow test-gpu lint types bench tables matrix clean

demo: $(READY)
	$(BIN)/python examples/demo.py build/demo

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -q

test-slow: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -q -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -q -m gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/first_light.py benchmarks/results/first_light.json

tables: $(READY)
	$(BIN)/python benchmarks/tables.py
	@$(BIN)/python -c "import matplotlib" 2>/dev/null && $(BIN)/python benchmarks/plots.py || echo "no plots: pip install matplotlib"

matrix: $(READY)
	$(BIN)/python benchmarks/support_matrix.py --jobs $(JOBS)

# torch goes in first, by the version that the constraints pin: what follows then finds it installed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("laconic needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
