# Everything happens in .venv, which scripts/setup makes and keeps in step with the lock files.
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev run test test-fast test-long proofs gpu chaos fuzz lint format docs reference audit sbom lock clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv with what a run needs
	@scripts/setup

setup-dev: ## the same, and what tests and lint need
	@scripts/setup --dev

run: setup ## fetch the sample photographs and run conf/full_pipeline.yaml
	$(BIN)/python -m orchestrator.data.samples food data/food
	$(BIN)/orchestrator run conf/full_pipeline.yaml

test: setup-dev ## run the tests; with CI=1 an unexpected skip is a failure
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

test-fast: setup-dev ## run the unit tests only
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not (slow or cluster or heavy)"

test-long: setup-dev ## run the tests that make test leaves out because they take long; CI runs both
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25 -m long

proofs: setup-dev ## run the slow proofs (minutes each)
	$(BIN)/python -m pytest -m slow

gpu: setup-dev ## run the tests that need a GPU, and measure a training step on it
	TEST_GPUS=1 $(BIN)/python -m pytest tests/gpu
	$(BIN)/python bench/gpu_step.py

MINUTES := 28
SEED := 1

chaos: setup-dev ## half an hour of faults on a real pipeline (MINUTES=28 SEED=1); summary in runs/chaos.md
	$(BIN)/python -m tests.chaos --minutes $(MINUTES) --seed $(SEED) --out runs/chaos.md

fuzz: setup-dev ## long runs of the hypothesis targets in tests/fuzz (MINUTES=28)
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

lint: setup-dev ## style, format, types, direction of imports, Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: setup-dev ## let ruff rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup-dev ## build the documentation site into site/; a broken link is a failure
	$(BIN)/mkdocs build --strict

reference: setup-dev ## write docs/reference.md, docs/commands.md and conf/schema.json again from the code
	$(BIN)/python -m orchestrator.reference.page > docs/reference.md
	COLUMNS=1000 $(BIN)/python -m typer orchestrator.cli utils docs --name orchestrator --title Commands --output docs/commands.md
	$(BIN)/orchestrator schema > conf/schema.json

audit: setup-dev ## compare the locked packages with known vulnerabilities, if osv.dev can be reached
	$(BIN)/python scripts/audit.py

sbom: setup-dev ## write what a run needs, with versions and licences, to dist/sbom.cdx.json (CycloneDX)
	$(BIN)/python scripts/sbom.py dist/sbom.cdx.json

lock: setup ## regenerate the lock files from pyproject.toml
	scripts/lock

clean: ## remove .venv and caches; keeps runs/ and data/
	rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .grimp_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
