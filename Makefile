# The commands that people use; `make` alone lists them.
PYTHON ?= python

.PHONY: help install check quick test docs

help:
	@echo "make install   install lrquant and everything that its tests need, in editable form"
	@echo "make check     lint, format and types, without changing a file"
	@echo "make quick     the suite without notebooks, benchmark scripts and browsers"
	@echo "make test      the whole suite, on two processors"
	@echo "make docs      write docs/cli.md and build the site"

install:
	$(PYTHON) -m pip install -e '.[test]'

check:
	ruff check
	ruff format --check
	mypy

quick:
	$(PYTHON) -m pytest -n 2 -m "not slow"

test:
	$(PYTHON) -m pytest -n 2

docs:
	$(PYTHON) scripts/cli_reference.py
	mkdocs build --strict
