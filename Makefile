# make quickstart   the whole job on the carried miniature model       make test   all tests
# Other interpreters: make test PYTHON=python3.12      Options of a verb: make quickstart ARGS="--device cuda"

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/runtime.installed
DEV := $(VENV)/dev.installed

.DEFAULT_GOAL := help
.PHONY: help quickstart generators miniature test unit lint clean

help:
	@echo "make quickstart   select, quality-tune and judge on the carried model; writes runs/quickstart/report.html"
	@echo "make generators   the same for every carried model, on one page: runs/generators/report.html"
	@echo "make miniature    make the carried model again, from nothing (at most 90 minutes on two cores);"
	@echo "                  another one: make miniature ARGS='--recipe pixel' (or masked)"
	@echo "make test         all tests (20 to 30 minutes on two cores)"
	@echo "make unit         the quick tests (under 90 seconds)"
	@echo "make lint         ruff, mypy, import-linter"
	@echo "make clean        remove .venv and caches; runs/ stays"
	@echo "Each sets up .venv first (about 4 minutes and 6 GB, once)."

quickstart: $(RUNTIME)
	@$(BIN)/emu quickstart $(ARGS)

generators: $(RUNTIME)
	@$(BIN)/emu generators $(ARGS)

miniature: $(RUNTIME)
	@$(BIN)/emu miniature $(ARGS)

test: $(DEV)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

unit: $(DEV)
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not smoke and not golden and not lint and not slow" $(ARGS)

lint: $(DEV)
	@$(BIN)/ruff check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache dist

# pip tells an interrupted installation from a whole one only by luck. So a mark lies in .venv while pip works;
# where it is found, the last set-up was killed and .venv is made anew (what was downloaded stays in pip's cache).
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "emu: needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@if [ -e $(VENV)/installing ]; then echo "emu: the last set-up was interrupted; starting it anew"; rm -rf $(VENV); fi
	@echo "emu: installing $(1) into $(VENV)"
	@$(PYTHON) -m venv $(VENV) && touch $(VENV)/installing
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "$(2)"; \
	  code=$$?; rm -f $(VENV)/installing; exit $$code
	@touch $@
endef

$(RUNTIME): pyproject.toml constraints.txt
	$(call install,what emu needs (about 4 minutes and 6 GB the first time),.)

$(DEV): $(RUNTIME)
	$(call install,what the tests need (seconds),.[dev])
