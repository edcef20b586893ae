# `make demo` and `make test` set up everything they need in .venv; only Python 3.11+ and make are required.
PYTHON ?= python3
PRESET ?= small
OUT ?= demo
FILE ?= examples/night.py
BIN := .venv/bin

.PHONY: demo queue queue-lists rehearse test lint clean help
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.run-ready: pyproject.toml | .venv/bin/python
	@echo "Installing bcmi-beamline into .venv (two to three minutes on a fresh machine) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/.test-ready: pyproject.toml | .venv/.run-ready
	@echo "Installing the test tools ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: .venv/.run-ready  ## the whole experiment on the simulated beamline; report in demo/report.html
	$(BIN)/bcmi demo --preset $(PRESET) --out $(OUT)

queue: .venv/.run-ready  ## a queue of plans on the simulated beamline, until Ctrl-C
	$(BIN)/bcmi queue serve --sim $(PRESET)

queue-lists: .venv/.run-ready  ## write anew what the queue knows of plans and devices
	BCMI_SIM=small BCMI_DIRECTORY=$$(mktemp -d) $(BIN)/qserver-list-plans-devices --device-max-depth 2 \
		--startup-dir profile_collection/startup --file-dir profile_collection/startup

rehearse: .venv/.run-ready  ## try a plan file on the simulated beamline: make rehearse FILE=examples/night.py
	$(BIN)/bcmi rehearse $(FILE)

test: .venv/.test-ready  ## every test: physics, Channel Access, one closed loop
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.test-ready  ## ruff, types and the rules on what may import what
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

clean:  ## remove .venv and what the demo wrote
	rm -rf .venv demo
