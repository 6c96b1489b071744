# The two commands are `make repro` and `make test`; `make help` lists the others.
PROFILE ?= smoke
SWEEP ?= smoke
SEQUENCE ?= smoke
DATA ?=
SET ?=
RUNS ?=
OUTPUT ?= comparison
CONFIG ?= smoke
KIND ?= good
PART ?= 1
MODEL ?= qadapter-smoke@champion
DEPLOYMENT ?= full-paper-repro/smoke
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An environment that is a link belongs to another clone: it is used as it is, nothing is installed into it.
LINKED := $(shell test -L $(VENV) && echo yes)
STAMP := $(if $(LINKED),,$(VENV)/.installed)

DATA_FLAG := $(if $(DATA),--data "$(DATA)")
# MODEL names the base of an experiment only where it is given to make itself; its default is what serve-model serves.
BASE_SET := $(if $(filter command,$(firstword $(origin MODEL))),"model.pretrained=$(MODEL)")

.PHONY: help install repro arena plan sweep continual spread compare test test-quick lint docs ui serve serve-model clean customize announce check history rollback drop

install: $(STAMP) ## the environment in .venv, and nothing else

repro: $(STAMP) ## run the whole experiment: make repro [PROFILE=mini DATA=folder] [MODEL=base] [SET="training.max_steps=50 seeds=[0,1]"]
	@$(BIN)/python -m qadapter run --profile "$(PROFILE)" $(DATA_FLAG) $(BASE_SET) $(SET)

arena: $(STAMP) ## every method in the toy world, two domains, three seeds: make arena [SET="seeds=[0]"]
	@$(BIN)/python -m qadapter run --profile arena $(SET)

plan: $(STAMP) ## check and estimate an experiment without running it: make plan PROFILE=paper
	@$(BIN)/python -m qadapter plan --profile "$(PROFILE)" $(DATA_FLAG) $(BASE_SET) $(SET)

sweep: $(STAMP) ## many settings, tables and front: make sweep [SWEEP=mini DATA=folder] [PLAN=1]
	@$(BIN)/python -m qadapter sweep --sweep "$(SWEEP)" $(DATA_FLAG) $(if $(PLAN),--plan) $(BASE_SET) $(SET)

continual: $(STAMP) ## one preference after the other, four ways: make continual [SEQUENCE=small DATA=folder] [PLAN=1]
	@$(BIN)/python -m qadapter continual --sequence "$(SEQUENCE)" $(DATA_FLAG) $(if $(PLAN),--plan) $(BASE_SET) $(SET)

spread: $(STAMP) ## an experiment over a work pool, a run for each method: make spread DEPLOYMENT=full-paper-repro/docker [PROFILE=mini DATA=folder]
	@$(BIN)/python -m qadapter spread "$(DEPLOYMENT)" --profile "$(PROFILE)" $(DATA_FLAG) $(SET)

compare: $(STAMP) ## the report of any recorded runs: make compare RUNS="run-id run-id" [OUTPUT=folder]
	@$(BIN)/python -m qadapter compare $(RUNS) --output "$(OUTPUT)"

# Three on two cores: a test of processes often waits for one.
test: $(STAMP) ## run all tests, three files at a time
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-quick: $(STAMP) ## run the unit tests: no server, no process
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not processes" --ignore tests/processes

lint: $(STAMP) ## lint, format check, type check
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(STAMP) ## the documentation site in site/, built strictly and without network
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

ui: $(STAMP) ## MLflow's UI on the runs of this folder, or of QADAPTER_HOME, http://127.0.0.1:5000
	@umask 077 && DO_NOT_TRACK=1 MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
		$(BIN)/mlflow server --app-name qadapter --host 127.0.0.1 --port 5000 --x-frame-options DENY \
		--allowed-hosts "127.0.0.1:5000,localhost:5000" --backend-store-uri "sqlite:///$(abspath $(or $(QADAPTER_HOME),$(CURDIR)))/mlflow.db"

serve: $(STAMP) ## Prefect server and worker with all deployments, http://127.0.0.1:4200
	@$(BIN)/python -m qadapter up

serve-model: $(STAMP) ## registered versions with OpenAI's chat API: make serve-model [MODEL="name@champion name@previous"]
	@$(BIN)/python -m qadapter serve-model $(MODEL)

customize: $(STAMP) ## look for new preferences: train, judge, promote or reject (docs/recurring.md): make customize [CONFIG=smoke] [FORCE=1]
	@$(BIN)/python -m qadapter customize --config "$(CONFIG)" $(if $(FORCE),--force)

announce: $(STAMP) ## tell the running server that there are new preferences: make announce [CONFIG=smoke]
	@$(BIN)/python -m qadapter announce --config "$(CONFIG)"

check: $(STAMP) ## measure the champion again: make check [CONFIG=smoke]
	@$(BIN)/python -m qadapter check --config "$(CONFIG)"

history: $(STAMP) ## every version of a registered model and why it is what it is: make history [CONFIG=smoke]
	@$(BIN)/python -m qadapter history --config "$(CONFIG)"

rollback: $(STAMP) ## the previous champion serves again: make rollback [CONFIG=smoke] [TO=3]
	@$(BIN)/python -m qadapter rollback --config "$(CONFIG)" $(if $(TO),--to $(TO))

drop: $(STAMP) ## a delivery of toy preferences: make drop [KIND=good|flipped|broken] [PART=1|2]
	@$(BIN)/python -m qadapter drop --kind "$(KIND)" --part "$(PART)"

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 13

ifndef LINKED
# pip, not uv: the pins are one `name==version` a line, without hosts.
$(STAMP): pyproject.toml setup.py installing/backend.py constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about four minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[pipeline,dev,docs]"
	@touch $@
endif

clean: ## remove the environment and caches of tools; results stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis site *.egg-info
