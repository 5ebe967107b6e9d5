# labelstation. `make` alone says what can be done.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
LOCAL := .local
VENV := $(LOCAL)/venv
LABEL_STUDIO := $(LOCAL)/label-studio
PY := $(VENV)/bin/python

# Settings of the scripts: .env, else those of the demo.
ENV_FILE ?= $(firstword $(wildcard .env $(LOCAL)/demo/station.env) .env)

# Options of the scripts.
TASK ?=
LIMIT ?=
DRY_RUN ?=
VERBOSE ?=
JSON ?=
OUTPUT_DIR ?=
CORPUS ?=
SINCE ?=
FULL ?=
ARGS ?=

# $(call option,NAME,--flag): --flag with the variable's value, if it has one.
option = $(if $($(1)),$(2) '$($(1))')
flag = $(if $(filter-out 0 false no,$($(1))),$(2))
COMMON = --env-file '$(ENV_FILE)' $(call flag,VERBOSE,--verbose) $(call flag,JSON,--json)
TASK_OPTIONS = $(call option,TASK,--task-type) $(call option,LIMIT,--limit) $(call flag,DRY_RUN,--dry-run)
run = $(if $(INVENTORY),$(call on_station,$(1)),$(PY) scripts/$(1).py $(COMMON))

-include make/deploy.mk

##@ Try it

.PHONY: help
help: ## Say what can be done
	@awk 'BEGIN {FS = ":.*## "} \
		/^##@ / {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z][a-z-]*:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nVariables: TASK=transcript_correction|translation_review|audio_segmentation LIMIT=50 DRY_RUN=1 JSON=1 VERBOSE=1\n'
	@printf '           CORPUS=folder OUTPUT_DIR=folder SINCE=2026-01-31 FULL=1 ENV_FILE=file ARGS="more options"\n'

.PHONY: demo
demo: $(VENV)/.local $(LABEL_STUDIO)/.done ## Run the whole loop here, with simulated annotators (CI=1: once, and check the numbers)
	@$(PY) scripts/demo.py $(if $(CI),--once) $(call option,LS_PORT,--label-studio-port) $(call option,AUDIO_PORT,--audio-port) $(ARGS)

.PHONY: demo-stop
demo-stop: $(VENV)/.local ## Stop a demo that was left in the background
	@$(PY) scripts/demo.py --stop

##@ Check it

.PHONY: test
test: $(VENV)/.test $(LABEL_STUDIO)/.done ## Run every test that this machine can run
	@$(PY) -m pytest $(ARGS)

.PHONY: lint
lint: $(VENV)/.test ## ruff, mypy, yamllint, shellcheck
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy scripts stubs tests demo bench docs make
	@git ls-files '*.yml' '*.yaml' | xargs --no-run-if-empty $(VENV)/bin/yamllint --strict
	@$(VENV)/bin/shellcheck .ci/run

.PHONY: bench
bench: $(VENV)/.local $(LABEL_STUDIO)/.done ## Measure each step beside what one would otherwise run (minutes)
	@PYTHONPATH=scripts $(PY) bench/bench.py $(ARGS)

##@ Work with it

.PHONY: migrate
migrate: $(VENV)/.local ## Bring the database to the current schema
	@$(call run,migrate) $(call flag,DRY_RUN,--dry-run) $(ARGS)

.PHONY: setup-projects
setup-projects: $(VENV)/.local ## Make or update the three Label Studio projects
	@$(call run,setup_projects) $(call option,TASK,--task-type) $(call flag,DRY_RUN,--dry-run) $(ARGS)

.PHONY: ingest
ingest: $(VENV)/.local ## Read a corpus folder into samples
	@$(call run,ingest) $(call flag,DRY_RUN,--dry-run) $(ARGS) $(if $(CORPUS),'$(CORPUS)')

.PHONY: push
push: $(VENV)/.local ## Give samples that need it a task in Label Studio
	@$(call run,push) $(TASK_OPTIONS) $(ARGS)

.PHONY: pull
pull: $(VENV)/.local ## Bring home what annotators did
	@$(call run,pull) $(TASK_OPTIONS) $(call option,SINCE,--since) $(call flag,FULL,--full) $(ARGS)

.PHONY: status
status: $(VENV)/.local ## Say how the work stands
	@$(call run,status) $(call option,TASK,--task-type) $(ARGS)

.PHONY: export
export: $(VENV)/.local ## Write reviewed data for training
	@$(call run,export) $(TASK_OPTIONS) $(call option,OUTPUT_DIR,--output-dir) $(ARGS)

.PHONY: manifest
manifest: $(VENV)/.local ## Write the manifest of the reviewed data
	@$(call run,manifest) $(call option,OUTPUT_DIR,--output-dir) $(ARGS)

##@ Develop it

.PHONY: lock
lock: $(VENV)/.uv ## Pin what requirements/*.in ask for, with hashes
	@cd requirements && for file in *.in; do \
		../$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
			"$$file" --output-file "$${file%.in}.txt"; \
	done

.PHONY: clean
clean: $(VENV)/.local ## Stop the demo and remove everything that was set up in this folder
	@$(PY) scripts/demo.py --stop
	@rm -rf $(LOCAL)

# Virtual environments. uv where it can be had, because it is several times faster; else pip.

$(VENV)/.uv: requirements/bootstrap.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'labelstation needs Python 3.11 or newer with venv (Debian: apt install python3-venv), or PYTHON=…' >&2; exit 78; }
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt || \
		echo 'uv cannot be installed here: going on with pip'
	@touch $@

# $(call install,python,requirements file)
define install
	@echo "installing $(2)"
	@if [ -x $(VENV)/bin/uv ]; then \
		$(VENV)/bin/uv pip install --quiet --python $(1) --require-hashes -r $(2); \
	else \
		$(1) -m pip install --quiet --disable-pip-version-check --require-hashes -r $(2); \
	fi
endef

$(VENV)/.local: requirements/local.txt $(VENV)/.uv
	$(call install,$(PY),requirements/local.txt)
	@touch $@

$(VENV)/.test: requirements/test.txt $(VENV)/.local
	$(call install,$(PY),requirements/test.txt)
	@touch $@

$(LABEL_STUDIO)/.done: requirements/label_studio.txt $(VENV)/.uv
	@$(PYTHON) -m venv $(LABEL_STUDIO)
	$(call install,$(LABEL_STUDIO)/bin/python,requirements/label_studio.txt)
	@touch $@
