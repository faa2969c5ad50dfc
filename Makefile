# The commands that people use; `make` alone lists them.
PYTHON ?= python

.PHONY: help install check quick test docs build demo

help:
	@echo "make install   install lrquant and everything that its tests need, in editable form"
	@echo "make check     lint, format, types and spelling, without changing a file"
	@echo "make quick     the suite without notebooks, benchmark scripts and browsers"
	@echo "make test      the whole suite, on two processors"
	@echo "make docs      write docs/cli.md and build the site"
	@echo "make build     build the wheel and the source archive in dist/"
	@echo "make demo      install the wheel into an environment of its own and run the demo there"

install:
	$(PYTHON) -m pip install -e '.[test]'

check:
	ruff check
	ruff format --check
	mypy
	codespell

quick:
	$(PYTHON) -m pytest -n 2 -m "not slow"

test:
	$(PYTHON) -m pytest -n 2

docs:
	$(PYTHON) scripts/cli_reference.py
	mkdocs build --strict

build:
	rm -rf dist
	$(PYTHON) -m pip install build
	$(PYTHON) -m build

demo:
	$(PYTHON) -m venv --clear dist/.venv
	dist/.venv/bin/pip install dist/lrquant-*.whl
	dist/.venv/bin/lrquant demo
