"""The project's own rules: clean lint and types, imports in one direction, documents that tell the truth."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]])
def test_lint_and_types(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_spelling() -> None:
    pytest.importorskip("codespell_lib")
    done = subprocess.run([sys.executable, "-m", "codespell_lib"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_map_matches_the_folders() -> None:
    shown = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "src" / "lrquant").iterdir():
        if path.name.startswith(("__", "py.typed")):
            continue
        assert path.name in shown, f"docs/architecture.md does not mention {path.name}"


def readme_commands() -> list[str]:
    return re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.M)


def test_ci_runs_the_readmes_test_command() -> None:
    run, test = readme_commands()
    assert run.endswith("lrquant demo")
    assert test in (ROOT / ".ci" / "run").read_text()


def test_the_workflow_of_a_public_forge_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "ci_workflow.py"))
    assert script["TARGET"].read_text() == script["workflow"](), "run python scripts/ci_workflow.py"
    jobs = yaml.safe_load(script["workflow"]())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert all(command.removeprefix("make ") in targets for command in commands if command.startswith("make "))
    assert any("'torch==2.11.*'" in command and "'transformers==5.20.*'" in command for command in commands)


@pytest.mark.slow
def test_the_readmes_python_runs() -> None:
    """The README's example, shortened to two samples."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code
    quick = (
        code[1].replace("nsamples=32, seqlen=256", "nsamples=2, seqlen=32, epochs=1").replace("seqlen=256", "seqlen=32")
    )
    quick = quick.replace("32)\nprint", "32, limit_windows=2)\nprint").replace("=32))", "=32, limit_windows=2))")
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", quick], cwd=folder, capture_output=True, text=True)
    assert "Perplexity" in done.stdout, done.stderr


def test_links_in_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
