# make demo          train a small DINO on generated images, evaluate it, draw its detections
# make test          the whole test suite
# make test-faults   kills, full disks, damage, hung processes: every drill, with its figures
# make check         formatters, linter, suite
# Set-up happens on the first call: a virtual environment in .venv that sees the packages of $(PYTHON),
# the missing dependencies, the compiled operators, and Detectron2 if it can be had.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
NATIVE := $(shell find ops -type f -name '*.[hc]*')

# Waiting threads soon give up their core. By default they keep it for milliseconds, which makes
# small tensors slower, and on a busy machine many times slower.
export GOMP_SPINCOUNT ?= 10000

.PHONY: demo test test-faults check format setup clean

demo: setup
	$(RUN) -m dino_d2.tools.demo --out output/demo

test: setup
	$(RUN) -m pytest

test-faults: setup
	FAULTS=full $(RUN) -m pytest -m faults -s -q

check: setup $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(NATIVE) $(shell find tests -name '*.cpp' -o -name '*.h')
	$(RUN) -m pytest

format: $(VENV)/.dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(NATIVE) $(shell find tests -name '*.cpp' -o -name '*.h')

setup: $(VENV)/.ready $(VENV)/.detectron2

# To venv, the system's packages are the base Python's: where $(PYTHON) is a virtual environment
# itself, its packages are added.
PACKAGES = import sys, sysconfig; path = sysconfig.get_path("purelib")
$(VENV)/bin/python:
	@$(PYTHON) -m venv --system-site-packages $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(PYTHON) -c '$(PACKAGES); \
	  sys.prefix == sys.base_prefix or print(f"import site; site.addsitedir({path!r})")' \
	  >"$$($@ -c '$(PACKAGES); print(path)')/outer.pth"

# PyTorch comes first: the operators are built against it.
$(VENV)/.ready: pyproject.toml setup.py $(NATIVE) | $(VENV)/bin/python
	@echo 'Setting up $(VENV): dependencies and compiled operators...'
	@$(RUN) -m pip install --quiet 'setuptools>=77' wheel 'torch>=2.11'
	@$(RUN) -m pip install --quiet --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.ready
	@$(RUN) -m pip install --quiet --no-build-isolation -e '.[dev]'
	@touch $@

# Optional, and tried once per change of its pin in pyproject.toml.
$(VENV)/.detectron2: pyproject.toml | $(VENV)/.ready
	@$(RUN) -c 'import dino_d2.d2' 2>/dev/null || { \
	  echo 'Installing Detectron2 from its repository (optional, takes minutes)...'; \
	  GIT_TERMINAL_PROMPT=0 $(RUN) -m pip install --quiet --no-build-isolation \
	    "$$(sed -n 's/^ *"\(detectron2 @ [^"]*\)".*/\1/p' pyproject.toml)" \
	    >$(VENV)/detectron2.log 2>&1; } || echo 'Detectron2 could not be installed; the log is in' \
	    '$(VENV)/detectron2.log. All that does not need it works without it: the tests that do are' \
	    'skipped, and the demo trains the same model in plain PyTorch. To try again, delete $@.'
	@touch $@

clean:
	rm -rf $(VENV) build dist output *.egg-info dino_d2/*.so dino_d2/_build.json
