"""Bundled models and texts, so that everything works offline."""

from pathlib import Path

from lrquant.errors import UsageError

ZOO_PREFIX = "zoo:"
_MODELS = Path(__file__).parent / "models"


def zoo_models() -> tuple[str, ...]:
    """Names of the bundled models."""
    return tuple(sorted(path.name for path in _MODELS.iterdir() if (path / "config.json").is_file()))


def zoo_model_path(name: str) -> Path:
    """The folder of `zoo:NAME`."""
    short = name.removeprefix(ZOO_PREFIX)
    if short not in zoo_models():
        raise UsageError(f"unknown model {name!r}: the zoo has {', '.join(ZOO_PREFIX + n for n in zoo_models())}")
    return _MODELS / short
