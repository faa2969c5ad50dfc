"""A hook of mkdocs: pages of docs/ that mkdocs.yml does not name appear under "More", so that none is forgotten."""

from pathlib import Path
from typing import Any


def _named(entry: Any) -> set[str]:
    if isinstance(entry, str):
        return {entry}
    values = entry.values() if isinstance(entry, dict) else entry
    return set().union(*(_named(value) for value in values))


def on_config(config: Any) -> Any:
    named = _named(config["nav"])
    more = [path.name for path in sorted(Path(config["docs_dir"]).glob("*.md")) if path.name not in named]
    if more:
        config["nav"].append({"More": more})
    return config
