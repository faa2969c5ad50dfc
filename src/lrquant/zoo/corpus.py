"""Offline text that every CPython carries: two data sets, each with a fixed train and held-out part.

`pydoc` is English: the language reference of `pydoc_data.topics` and the docstrings of the standard
library. `pycode` is source code: the same modules with their docstrings taken out, so that the two sets
share no sentence and behave as two domains. A document belongs to the held-out part when the hash of its
name says so; the same module is therefore on the same side in both sets, on every machine and in every
Python release. The texts themselves follow the interpreter's version, so results name it.
"""

import ast
import hashlib
import importlib
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

HELD_OUT_IN = 10  # one document in ten is held out

_FOREIGN = frozenset("site-packages dist-packages encodings pydoc_data lib-dynload __pycache__ __phello__".split())  # noqa: SIM905
# Parts of the standard library that some distributions package separately.
_OPTIONAL = frozenset("test tests idle_test idlelib lib2to3 distutils tkinter turtledemo ensurepip".split())  # noqa: SIM905

_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)


def is_held_out(name: str) -> bool:
    """Whether the document `name` is in the held-out part: decided by its SHA-256 alone."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_IN == 0


def _sources(optional: bool, held_out: bool | None = None) -> Iterator[tuple[str, str]]:
    """(dotted module name, source) of the standard library's modules, in the order of their names.

    `held_out`: only those of that part; None: all.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for folder, inner, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        # Not entered: what is installed beside the library is many times its size.
        inner[:] = [name for name in inner if name not in _FOREIGN and not name.startswith("config-")]
        if _OPTIONAL.isdisjoint(relative.parts) == optional:
            continue
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                found[".".join((*relative.parts, name.removesuffix(".py")))] = Path(folder, name)
    for name in sorted(found):
        if held_out is None or is_held_out(name) == held_out:
            yield name, found[name].read_text(encoding="utf-8", errors="replace")


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, ast.Expr, str]]:
    """(name of the owner, the docstring's statement, its cleaned text) of every docstring in `tree`."""
    level: list[ast.AST] = [tree]
    while level:  # level by level; definitions are within statements, never within expressions
        for node in level:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield getattr(node, "name", ""), node.body[0], text  # type: ignore[misc]
        level = [inner for node in level for inner in ast.iter_child_nodes(node) if isinstance(inner, _STATEMENTS)]


@cache
def _modules(held_out: bool) -> tuple[tuple[str, str, str], ...]:
    """(name, its docstrings as text, its source without them) of every module of a part that parses."""
    modules = []
    for name, source in _sources(optional=False, held_out=held_out):
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        lines = source.splitlines()
        prose = []
        for owner, statement, text in _docstrings(tree):
            prose.append(f"{name}.{owner}\n\n{text}\n" if owner else f"{name}\n\n{text}\n")
            for number in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
                lines[number] = ""
        code = "\n".join(line for before, line in zip(["x", *lines], lines, strict=False) if before or line)
        modules.append((name, "\n".join(prose), code.strip() + "\n"))
    return tuple(modules)


def rest_of_library() -> tuple[str, ...]:
    """Sources of the optional parts (tests, idlelib, …) as far as they are installed: training text only."""
    return tuple(source for _, source in _sources(optional=True))


def _topics() -> dict[str, str]:
    return importlib.import_module("pydoc_data.topics").topics


@cache
def documents(dataset: str, split: str) -> tuple[str, ...]:
    """Documents of `dataset` (`pydoc` or `pycode`), part `split` (`train` or `heldout`), ordered by name."""
    if dataset not in ("pydoc", "pycode"):
        raise ValueError(f"unknown offline text {dataset!r}: there are 'pydoc' and 'pycode'")
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown part {split!r}: there are 'train' and 'heldout'")
    modules = _modules(split == "heldout")
    if dataset == "pycode":
        return tuple(code for _, _, code in modules if len(code) > 1)
    topics = [(f"topic:{name}", text) for name, text in sorted(_topics().items())]
    chosen = [text for name, text in topics if is_held_out(name) == (split == "heldout")]
    return (*chosen, *(prose for _, prose, _ in modules if prose))
