.DEFAULT_GOAL := help
.PHONY: help install export clean readme format lint types test coverage ci build

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

install:  ## install the package as it lies here, with its tools
	python -m pip install -e ".[dev]"

export:  ## notebooks -> linearpatch/*.py
	nbdev_export

clean:  ## drop execution counts and metadata from the notebooks
	nbdev_clean

readme:  ## nbs/index.ipynb -> README.md
	python tools/readme.py make

format:  ## format notebooks, tests and tools; then export
	ruff format .
	nbdev_export

lint:  ## check style and formatting
	ruff check .
	ruff format --check .

types:  ## check the types
	mypy

test:  ## every notebook, then pytest
	python tests/run.py

coverage:  ## pytest alone, and which lines it reaches
	python -m pytest -n auto --dist worksteal --cov

ci:  ## what continuous integration runs: a fresh clone, a fresh environment
	.ci/run

build:  ## sdist and wheel, in dist/
	python -m build
