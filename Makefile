# make demo | demo-train | test | setup | clean: each works on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
CADDF := $(BIN)/caddf

.PHONY: setup extras demo demo-shipped demo-train test lint wheel clean

setup: .venv/installed

# What benchmarks, plots, the report, the server and the harness adapter need.
extras: .venv/extras

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "PYTHON is $$($(PYTHON) --version 2>&1); it must be 3.11, 3.12 or 3.13 (make PYTHON=python3.11 ...)"; exit 2; }
	@echo "setting up .venv: a minute or two"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hub,dev]'
	@touch $@

.venv/extras: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,serve,lm-eval]'
	@touch $@

# Writes with the model that is shipped; where there is none, with one that is trained first.
SHIPPED := checkpoints/tiny
demo: $(if $(wildcard $(SHIPPED)/config.json),demo-shipped,demo-train)

demo-shipped: setup
	@echo; echo "A continuation: drafts in green stand, those struck out were corrected."
	$(CADDF) generate $(SHIPPED) --prompt 'It was late in the evening when' --max-new-tokens 96 --temperature 0.8 --top-p 0.95 --show
	@echo; echo "A hole, filled with what comes after it in sight."
	$(CADDF) generate $(SHIPPED) --template 'The old man opened the door,[MASK:24] and they never spoke of it again.' --temperature 0.8 --show
	@echo; echo "The same text twice: token by token, and with drafts that the same model verifies."
	$(CADDF) generate $(SHIPPED) --prompt 'She looked at him and said' --max-new-tokens 48 --decoder autoregressive --temperature 0
	$(CADDF) generate $(SHIPPED) --prompt 'She looked at him and said' --max-new-tokens 48 --decoder speculative --temperature 0

# From nothing, on Python's own standard library: real text that is already on the machine.
demo-train: setup
	rm -rf demo
	$(CADDF) data prepare --input stdlib:3000000 --tokenizer bpe:2048 --out demo/data
	$(CADDF) train --data demo/data --out demo/run --model.size demo --train.steps 600 --train.batch_size 4
	$(CADDF) evaluate demo/run --data demo/data --max-windows 16
	$(CADDF) generate demo/run --prompt 'def __init__(self, ' --max-new-tokens 96 --temperature 0.7 --show
	$(CADDF) generate demo/run --template 'def read(self, path):[MASK:24]return data' --decoder ancestral --steps 8 --show

test: setup lint .venv/extras
	$(BIN)/pytest -q -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy

wheel: setup
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv demo build dist
