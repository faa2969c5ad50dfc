"""The presets of `Recipe.preset`: what each method changes in a recipe's defaults, as tables."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lrquant.errors import UsageError
from lrquant.settings import HIGH_PRECISION_BITS

if TYPE_CHECKING:
    from lrquant.formats.presets import NamedFormat

# Defaults of the fields by which presets choose.
DEFAULT_NUMBERS, DEFAULT_ABITS, DEFAULT_NSAMPLES = "int", 4, 128

_NO_LEARNING: dict[str, Any] = {"lwc": False, "epochs": 0, "smooth_attention": False, "smooth_mlp": False}

PRESETS: dict[str, dict[str, Any]] = {
    "rtn": _NO_LEARNING | {"let": False},
    "smoothquant": _NO_LEARNING | {"init": "smoothquant", "shift": "off"},
    "omniquant": {"init": "smoothquant", "loss": "mse", "smooth_mlp": False, "schedule": "constant"},
    "lrquant": {},
    "lrquant+": {"two_branch": True, "dynamic_loss": True, "rotation_vectors": True},
    "lrquant-max": {
        "two_branch": True,
        "dynamic_loss": True,
        "rotation_vectors": True,
        "rounding": "learned",
        "epochs": 10,
        "batch_size": 8,
        "let_lr": 5e-3,  # offsets are learned for the scales as they are: those had better stay near
    },
}

_PAPER: dict[str, Any] = {
    "bos": "off",
    "epochs": 20,
    "batch_size": 1,
    "let_lr": 5e-3,
    "lwc_lr": 1e-2,
    "schedule": "constant",
    "smooth_mlp": False,
}
PAPER_EXACT: dict[str, dict[str, Any]] = {
    "omniquant": _PAPER,
    "lrquant": _PAPER | {"shift": "on"},
    "lrquant+": _PAPER | {"shift": "on", "two_branch": True, "dynamic_loss": True, "rotation_vectors": True},
}


# What a preset changes when activations are left alone: OmniQuant then learns clipping only, as published; beside
# learned rounding LRQuant+'s parts bring nothing more, and tuning does, which rounded activations drown.
WEIGHT_ONLY: dict[str, dict[str, Any]] = {
    "omniquant": {"let": False},
    "lrquant-max": {"two_branch": False, "dynamic_loss": False, "rotation_vectors": False, "tuning_epochs": 4},
}

# What a preset changes for activations of few integer bits: an outlier channel leaves the others hardly any of them,
# and a massive activation makes MSE the error of one token. Weight-only at two bits, the balanced loss did harm.
FEW_ACTIVATION_BITS = 6
FEW_BITS: dict[str, dict[str, Any]] = {
    "lrquant-max": {"rotate": ("auto",), "loss": "balanced", "dynamic_loss": False},
}

# A step takes one of so many samples, up to the preset's batch size: learned rounding would have too few steps with few
# samples (docs/benchmarks.md).
SAMPLES_OF_A_STEP = {"lrquant-max": 16}

# What a preset changes for weights of fewer integer bits than these and for four-bit floats, unless coarse activations
# drown what more epochs bring (docs/benchmarks.md).
FINE_WEIGHT_BITS = 4
COARSE_WEIGHTS: dict[str, dict[str, Any]] = {"lrquant-max": {"epochs": 24}}

# The same tables with the words by which help names their condition.
ADJUSTMENTS: tuple[tuple[str, dict[str, dict[str, Any]]], ...] = (
    ("for 16-bit activations", WEIGHT_ONLY),
    (f"for activations of {FEW_ACTIVATION_BITS} bits or fewer", FEW_BITS),
    (f"for weights below {FINE_WEIGHT_BITS} bits and four-bit floats", COARSE_WEIGHTS),
)


def defaults(method: str, chosen: Mapping[str, Any], paper_exact: bool = False) -> dict[str, Any]:
    """What the preset `method` is for the number format and samples in `chosen`, values that nobody checked yet.

    Raises:
        UsageError: `paper_exact` of a method that learns nothing.
    """
    bits, row = chosen.get("abits", DEFAULT_ABITS), _row(chosen.get("numbers"))
    weights = chosen.get("target_bits") or chosen.get("wbits")
    few = isinstance(weights, int | float) and weights < FINE_WEIGHT_BITS
    coarse = few if row.chooses else row.weights.bits <= FINE_WEIGHT_BITS
    few_activation_bits = row.chooses and bits in range(2, FEW_ACTIVATION_BITS + 1)
    values = dict(PRESETS[method])
    if bits == HIGH_PRECISION_BITS:
        values |= WEIGHT_ONLY.get(method, {})
    if few_activation_bits:
        values |= FEW_BITS.get(method, {})
    elif coarse:
        values |= COARSE_WEIGHTS.get(method, {})
    samples = chosen.get("nsamples", DEFAULT_NSAMPLES)
    if method in SAMPLES_OF_A_STEP and isinstance(samples, int):
        values["batch_size"] = max(1, min(values["batch_size"], samples // SAMPLES_OF_A_STEP[method]))
    if paper_exact:
        values |= _paper_exact(method, chosen)
    return values | _format_defaults(chosen)


def number_formats() -> Mapping[str, "NamedFormat"]:
    """The table of number formats, by what `numbers` says."""
    import lrquant.formats  # noqa: F401 - whose rows register themselves
    from lrquant.formats.presets import TABLE

    return TABLE


def _row(name: Any) -> "NamedFormat":
    """The row called `name`, a value that nobody checked yet; integers' in place of none or an unknown one."""
    default = number_formats()[DEFAULT_NUMBERS]
    return number_formats().get(name, default) if isinstance(name, str) else default


def _format_defaults(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What every preset changes for the number formats in `chosen`."""
    weights, inputs = _row(chosen.get("numbers")), _row(chosen.get("input_numbers") or chosen.get("numbers"))
    values = {} if inputs.chooses else {"quantize_attention": False}  # no attention has them
    if not weights.chooses and not weights.weights.takes_gain:
        values["rotation_vectors"] = False
    return values | dict(weights.defaults)


def _paper_exact(method: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's setting of `method`; weight-only learns clipping (and rotations) without smoothing."""
    if method not in PAPER_EXACT:
        raise UsageError(f"paper_exact works with {', '.join(PAPER_EXACT)}; {method} learns nothing")
    return PAPER_EXACT[method] | ({"let": False} if chosen.get("abits") == HIGH_PRECISION_BITS else {})


def with_format(name: str | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` that are not None, and the fields of the format called `name`.

    Raises:
        UsageError: no such format, or a change says otherwise.
    """
    chosen = {key: value for key, value in changes.items() if value is not None}
    if name is None:
        return chosen
    from lrquant.formats.presets import FORMATS

    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}: there are {', '.join(FORMATS)}")
    for key, value in FORMATS[name].items():
        if chosen.get(key, value) != value:
            raise UsageError(f"{key} = {chosen[key]}: the format {name} has {value}; leave out one of the two")
    return _format_defaults(FORMATS[name]) | FORMATS[name] | chosen
