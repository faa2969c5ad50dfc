"""Shell completion: names that are known without heavy imports."""

from pathlib import Path

_ZOO_MODELS = Path(__file__).parents[1] / "zoo" / "models"

# `lrquant.formats.presets.FORMATS`, which help has no time to import; a test compares the two.
FORMAT_NAMES = (
    *("w4a16-g128", "w3a16-g128", "w2a16-g64", "w8a8", "w4a8", "w4a4", "w4a8-fp8"),
    *("fp8", "fp8-static", "fp8-block", "fp8a16"),
    *("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "mxfp8", "mxfp8a16"),
)


def _starting(incomplete: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def model_names(incomplete: str) -> list[str]:
    """Bundled models, and folders with models."""
    zoo = [f"zoo:{path.name}" for path in sorted(_ZOO_MODELS.iterdir()) if path.is_dir()]
    return _starting(incomplete, [*zoo, *(str(path.parent) for path in sorted(Path.cwd().glob("*/config.json")))])


def method_names(incomplete: str) -> list[str]:
    """Presets that begin with `incomplete`."""
    from lrquant.method_presets import PRESETS

    return _starting(incomplete, list(PRESETS))


def format_names(incomplete: str) -> list[str]:
    """Number formats that begin with `incomplete`."""
    return _starting(incomplete, list(FORMAT_NAMES))


def runtime_names(incomplete: str) -> list[str]:
    """Programs for `--for` that begin with `incomplete`."""
    from lrquant.runtimes import RUNTIMES

    return _starting(incomplete, [runtime.key for runtime in RUNTIMES])


def calibration_names(incomplete: str) -> list[str]:
    """Calibration sets that begin with `incomplete`."""
    names = ["wikitext2", "ptb", "c4", "zoo:pydoc", "zoo:pycode", "zoo:shapes", "zoo:shapes-vqa"]
    return _starting(incomplete, names)
