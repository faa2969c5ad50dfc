"""Write .github/workflows/tests.yml: `python scripts/ci_workflow.py`. A test checks that the file is up to date.

The jobs run the commands that developers run: `.ci/run` and the targets of the Makefile. The versions of Python come
from pyproject.toml, and the lowest versions of PyTorch and transformers are the lower bounds there.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
TARGET = ROOT / ".github" / "workflows" / "tests.yml"
SYSTEMS = ("ubuntu-latest", "macos-latest")
LOWEST = ("torch", "transformers", "compressed-tensors")
HEADER = "# Generated from pyproject.toml by scripts/ci_workflow.py; do not edit.\n"


def pythons(project: dict[str, Any]) -> list[str]:
    """Versions of Python in the classifiers, such as 3.11."""
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", each) for each in project["classifiers"])
    return [match[1] for match in found if match]


def lowest(project: dict[str, Any]) -> list[str]:
    """Requirements that pin each package of `LOWEST` to its lower bound: `torch==2.11.*`."""
    bounds = (re.match(r"([\w-]+)>=([\d.]+)", each) for each in project["dependencies"])
    return [f"{match[1]}=={match[2]}.*" for match in bounds if match and match[1] in LOWEST]


def job(python: str, *commands: str, system: str = "ubuntu-latest", **more: Any) -> dict[str, Any]:
    """A job that checks the repository out and runs `commands`."""
    steps: list[dict[str, Any]] = [
        {"uses": "actions/checkout@v4"},
        {"uses": "actions/setup-python@v5", "with": {"python-version": python}},
    ]
    return {"runs-on": system, **more, "steps": steps + [{"run": command} for command in commands]}


def workflow() -> str:
    """The file's content."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = pythons(project)
    pins = " ".join(f"'{pin}'" for pin in lowest(project))
    matrix = {"fail-fast": False, "matrix": {"system": list(SYSTEMS), "python": versions}}
    jobs = {
        "suite": job("${{ matrix.python }}", "bash .ci/run", system="${{ matrix.system }}", strategy=matrix),
        "lowest": job(versions[0], "make install", f"python -m pip install {pins}", "make quick"),
        "docs": job(versions[-1], "make install", "make docs", "git diff --exit-code docs/cli.md"),
        "build": job(versions[-1], "make build", "make demo"),
    }
    content = {"name": "tests", "on": ["push", "pull_request"], "permissions": {"contents": "read"}, "jobs": jobs}
    return HEADER + yaml.safe_dump(content, sort_keys=False, width=120)


if __name__ == "__main__":
    TARGET.write_text(workflow())
