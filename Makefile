# Thin doors to `python -m rag_kit …`, which sets up .venv where it must; without make, type that.
# Another Python:  make run PYTHON=python3.12
# Another PyTorch: make setup TORCH=torch==2.13.0 TORCH_INDEX=https://…

PYTHON ?= python3
.DEFAULT_GOAL := help
.PHONY: help setup run test lint lab refresh-notebooks clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-18s %s\n", $$1, $$2}'

setup: ## .venv, the pinned packages and the embedded models (the others do it too, where needed)
	@$(PYTHON) -m rag_kit setup

run: ## train, index and compare: the notebooks, their table, and where everything lies
	@$(PYTHON) -m rag_kit run

test: ## every test, the notebooks included
	@$(PYTHON) -m rag_kit test

lint: ## ruff and mypy
	@$(PYTHON) -m rag_kit.bootstrap -m ruff check .
	@$(PYTHON) -m rag_kit.bootstrap -m mypy

lab: ## JupyterLab on the notebooks
	@$(PYTHON) -m rag_kit.bootstrap -m jupyter lab --notebook-dir=notebooks

refresh-notebooks: ## execute the committed notebooks in place
	@$(PYTHON) -m rag_kit refresh-notebooks

clean: ## remove .venv and the tools' caches; adapters, indexes and runs stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rag_kit tests notebooks -name __pycache__ -prune -exec rm -rf {} +
