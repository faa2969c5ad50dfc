"""Every block of code in the documentation runs, in order, with fewer samples; the site builds without a warning.

A block behind the comment `<!-- not run: REASON -->` needs what a test has not got; its `lrquant` commands are parsed.
"""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import typer.main

from lrquant.cli.main import app
from tests.cli.run import lrquant
from tests.tiny import write_tiny

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTED_ELSEWHERE = {
    "adding-a-format.md": "tests/test_adding_a_format.py",
    "adding-a-learnable.md": "tests/test_adding_a_learnable.py",
    "adding-an-exporter.md": "tests/test_adding_an_exporter.py",
    "adding-a-model.md": "tests/test_adding_a_model.py",
    "adding-a-vision-model.md": "tests/test_adding_a_vision_model.py",
    "cli.md": "tests/test_cli_reference.py",
}
# What a number may be at most while a test runs the block.
MOST = {
    "nsamples": 2,
    "seqlen": 64,
    "epochs": 1,
    "limit-windows": 2,
    "limit_windows": 2,
    "limit": 2,
    "max_new_tokens": 4,
}


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    code: str
    not_run: str  # why; empty: it is run


def test_the_tests_that_reliability_names_exist() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    known = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)`", page))
    assert len(names) > 25
    assert [name for name in sorted(names) if f"def {name}(" not in known] == []
    files = set(re.findall(r"`([\w/]+\.py)`", page))
    assert [file for file in sorted(files) if not (ROOT / "tests" / file).is_file()] == []


def blocks(page: Path) -> list[Block]:
    pattern = r"(?:<!-- not run: (?P<why>[^>]*?) -->\n)?^```(?P<language>bash|python)\n(?P<code>.*?)^```"
    found = re.finditer(pattern, page.read_text(), re.S | re.M)
    return [Block(page, match["language"], match["code"], match["why"] or "") for match in found]


def quickly(code: str, model: Path) -> str:
    """`code` with fewer samples, shorter windows, a single epoch, and `model` in place of the bundled one."""
    code = code.replace("zoo:llama", str(model))
    for name, most in MOST.items():
        code = re.sub(
            rf"(--{name} |\b{name}=)(\d+)",
            lambda match, most=most: f"{match[1]}{min(int(match[2]), most)}",  # type: ignore[misc]
            code,
        )
    return code


def commands(code: str) -> list[list[str]]:
    """The command lines of a bash block as words; a trailing backslash joins lines."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def parse(words: list[str]) -> None:
    """Raise when `lrquant` would refuse these words; nothing is run."""
    name, *rest = words[1:]
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, list(rest))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_lrquant_command_is_one(page: Path) -> None:
    for block in blocks(page):
        for words in commands(block.code) if block.language == "bash" else ():
            if words[0] == "lrquant" and not words[1].startswith("-"):
                parse(words)


RUN = [page for page in PAGES if page.name not in TESTED_ELSEWHERE and any(not b.not_run for b in blocks(page))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_code_runs(page: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lrquant.cli import demo
    from lrquant.report import page as report_page

    monkeypatch.setattr(report_page, "sections", lambda *_: [])  # figures have tests of their own

    few = {"nsamples": 2, "seqlen": 64}
    show = demo.SHOWS["zoo:llama"]
    quick = replace(show, recipe={**show.recipe, **few}, learning={"epochs": 1, "batch_size": 2}, limit=2)
    monkeypatch.setattr(demo, "SHOWS", {"zoo:llama": quick})
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.not_run:
            continue
        code = quickly(block.code, tiny)
        if block.language == "python":
            exec(compile(code, page.name, "exec"), names)
            continue
        for words in commands(code):
            if words[0] == "lrquant":
                done = lrquant(*words[1:], cwd=tmp_path)
            else:
                done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)  # type: ignore[assignment]
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"


def test_what_is_not_run_is_little_and_has_a_reason() -> None:
    left_out = [block for page in PAGES for block in blocks(page) if block.not_run]
    assert all(len(block.not_run) > 8 for block in left_out)
    run = [block for page in RUN for block in blocks(page) if not block.not_run]
    assert len(run) > len(left_out)


def test_pages_that_are_tested_elsewhere_are() -> None:
    for page, test in TESTED_ELSEWHERE.items():
        assert page in (ROOT / test).read_text()


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr  # --strict: a warning is an error
    assert "Quantize a language, vision or multimodal model" in (tmp_path / "site" / "api" / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        where = tmp_path / "site" / ("" if page.stem == "index" else page.stem) / "index.html"
        assert where.is_file(), page.name


def test_the_figures_are_what_the_code_draws() -> None:
    """Labels, not coordinates: another version of matplotlib may place a tick elsewhere."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import concept_figures

    for name in concept_figures.FIGURES:
        assert f"figures/{name}.svg" in (ROOT / "docs" / "concepts.md").read_text()
        kept, drawn = (ROOT / "docs" / "figures" / f"{name}.svg").read_text(), concept_figures.svg(name)
        words = [set(re.findall(r">([^<>]*[a-z]{3}[^<>]*)</text>", text)) for text in (kept, drawn)]
        assert words[0] == words[1] != set()
