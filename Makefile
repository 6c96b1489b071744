# The two commands are `make repro` and `make test`; `make help` lists the others.
PROFILE ?= smoke
DATA ?=
SET ?=
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

DATA_FLAG := $(if $(DATA),--data "$(DATA)")

.PHONY: help repro plan test lint ui serve clean

repro: $(STAMP) ## run the whole experiment: make repro [PROFILE=mini DATA=folder] [SET="training.max_steps=50 seeds=[0,1]"]
	@$(BIN)/python -m flows.run --profile "$(PROFILE)" $(DATA_FLAG) $(SET)

plan: $(STAMP) ## check and estimate an experiment without running it: make plan PROFILE=paper
	@$(BIN)/python -m flows.run --plan --profile "$(PROFILE)" $(DATA_FLAG) $(SET)

test: $(STAMP) ## run all tests
	@$(BIN)/python -m pytest

lint: $(STAMP) ## lint, format check, type check
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

ui: $(STAMP) ## MLflow's UI on the runs of this folder, http://127.0.0.1:5000
	@DO_NOT_TRACK=1 MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
		$(BIN)/mlflow ui --backend-store-uri "sqlite:///$(CURDIR)/mlflow.db" --host 127.0.0.1 --port 5000

serve: $(STAMP) ## Prefect server and worker with all deployments, http://127.0.0.1:4200
	@$(BIN)/python -m flows.serve

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

# pip, not uv: the pins are one `name==version` a line, without hosts.
$(STAMP): pyproject.toml constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about four minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean: ## remove the environment and caches of tools; results stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
