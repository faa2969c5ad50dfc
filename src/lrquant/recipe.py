"""The recipe: everything that decides a quantized model besides the model and the text.

A recipe is written beside every result as `recipe.yaml` and reproduces it. Presets are the published
methods as rows of one table: each is the same engine with parts switched on or off.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lrquant.errors import UsageError
from lrquant.formats import NamedFormat, Scheme
from lrquant.formats.integers import BITS
from lrquant.formats.presets import CACHES, FORMATS, HIGH_PRECISION_BITS, TABLE, row_of

RECIPE_FILE = "recipe.yaml"  # beside every result
_MAX_YAML_BYTES = 1 << 20


class Recipe(BaseModel):
    """What to quantize, into which format, and how to learn it.

    >>> Recipe.preset("lrquant", wbits=4, abits=4).to_yaml("recipe.yaml")
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field("lrquant", description="The preset this recipe started from")

    towers: tuple[Literal["vision", "language"], ...] | None = Field(
        None, description="Towers of a multimodal model to quantize; none: language, or the model's only tower"
    )

    also: tuple[Literal["head", "projector", "patch_embedding"], ...] = Field(
        (), description="Parts outside the blocks to round as well; otherwise they stay as they are"
    )

    # The number format.
    numbers: str = Field("int", description="Integers (int), or another row of the table of number formats, by name")
    input_numbers: str | None = Field(None, description="Numbers of activations; none: those of the weights")
    wbits: int = Field(4, description="Bits of a weight, 2 to 8; 16 leaves weights alone")
    abits: int = Field(4, description="Bits of an activation, 2 to 8; 16 is weight-only")
    group_size: int | None = Field(None, ge=1, description="Input channels that share a scale; none: a whole row")
    target_bits: float | None = Field(
        None, ge=2, le=9, description="Bits of a weight on average, scales included; each linear's follow from errors"
    )
    layer_bits: dict[str, int] | None = Field(
        None, description="Bits of each linear's weights, by name; found and written down where there is a target"
    )
    symmetric: bool = Field(False, description="Symmetric weight grids (no zero point)")
    activations_symmetric: bool = Field(False, description="Symmetric activation grids")
    quantize_attention: bool = Field(True, description="Quantize queries, keys and values at the activations' bits")

    kv_cache: str | None = Field(
        None,
        description="Numbers of keys and values as the cache keeps them, by one calibrated scale each; none: 16 bits",
    )

    # The transformations.
    let: bool = Field(True, description="Smooth activations by learnable equivalent transformations")
    init: Literal["log", "smoothquant", "neutral"] = Field("log", description="How smoothing starts; neutral: S = 1")
    alpha: float = Field(0.5, ge=0, le=1, description="SmoothQuant's migration strength")
    shift: Literal["auto", "on", "off"] = Field(
        "auto", description="Learn shifts: where the model holds them, or always"
    )
    smooth_attention: bool = Field(True, description="Scales between v and out, and between queries and keys")
    smooth_mlp: bool = Field(True, description="Scales between up and down projections")
    lwc: bool = Field(True, description="Learnable weight clipping")
    orthogonal: tuple[Literal["auto", "stream", "values", "down"], ...] = Field(
        (),
        description="What is rotated by orthogonal matrices before anything is learned; down: at run time; auto: what "
        "costs nothing in the checkpoint",
    )
    orthogonal_kind: Literal["hadamard", "random"] = Field(
        "hadamard", description="Hadamard matrices with random signs, or random orthogonal matrices"
    )

    # The learning.
    loss: Literal["mse", "mse+nlc", "balanced"] = Field(
        "mse+nlc", description="Reconstruction loss; balanced: relative improvements of error and NLC count alike"
    )
    two_branch: bool = Field(False, description="Targets from the original's own stream and from the quantized one")
    dynamic_loss: bool = Field(False, description="Weight the loss terms by their running averages")
    rotation: bool = Field(False, description="Learn rotation vectors on dequantized weights")
    rotation_rank: int = Field(1, ge=1, le=64, description="1 folds into the scales; more is a dense export")
    rounding: Literal["nearest", "learned", "gptq"] = Field(
        "nearest",
        description="Weights to the nearest integer, by an offset learned for each weight, by compensation (GPTQ)",
    )
    epochs: int = Field(6, ge=0, le=10_000, description="Passes over the calibration samples per block")
    batch_size: int = Field(4, ge=1, description="Samples per step")
    let_lr: float | None = Field(None, gt=0, le=1, description="Learning rate of smoothing; none: by the steps")
    lwc_lr: float | None = Field(None, gt=0, le=1, description="Learning rate of clipping; none: by the steps")
    rounding_lr: float | None = Field(None, gt=0, le=1, description="Learning rate of rounding; none: by the steps")
    early_stop: float = Field(
        0.0, ge=0, lt=1, description="Leave a block when two epochs lowered its loss by less than this share; 0: never"
    )
    schedule: Literal["constant", "cosine"] = Field("cosine", description="How rates change over a block's steps")

    tuning_epochs: int = Field(
        0, ge=0, le=10_000, description="Passes over the samples in which the whole model's scales are learned at last"
    )
    tuning_lr: float = Field(1e-3, gt=0, le=1, description="Learning rate of that, for factors that start at one")

    # The calibration samples and the machine.
    calibration: str = Field("wikitext2", description="Data set or file the samples come from")
    nsamples: int = Field(128, ge=1, le=1_000_000, description="Calibration samples")
    seqlen: int | None = Field(
        None, ge=2, le=1_000_000, description="Tokens per sample; none: 2048 or the model's most"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Decides samples and their order")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="Precision of the computation")
    products: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of matrix products while learning; auto: bfloat16 where the machine is fast at it",
    )
    kernels: Literal["auto", "eager", "compiled", "triton"] = Field(
        "auto", description="How fake quantization runs while learning; all give the same integers"
    )

    @field_validator("shift", mode="before")
    @classmethod
    def _yaml_reads_on_as_true(cls, shift: Any) -> Any:
        return {True: "on", False: "off"}.get(shift, shift) if isinstance(shift, bool) else shift

    @field_validator("numbers", "input_numbers")
    @classmethod
    def _known_numbers(cls, name: str | None) -> str | None:
        if name is not None and name not in TABLE:
            raise ValueError(f"there are {', '.join(TABLE)}")
        return name

    @field_validator("kv_cache")
    @classmethod
    def _known_cache(cls, name: str | None) -> str | None:
        if name is not None and name not in CACHES:
            raise ValueError(f"there are {', '.join(CACHES)}")
        return name

    @field_validator("wbits", "abits")
    @classmethod
    def _known_bits(cls, bits: int) -> int:
        if bits not in BITS and bits != HIGH_PRECISION_BITS:
            raise ValueError("integers have 2 to 8 bits, and 16 leaves a tensor unquantized")
        return bits

    @model_validator(mode="after")
    def _something_to_do(self) -> "Recipe":
        if self.wbits == self.abits == HIGH_PRECISION_BITS and self.kv_cache is None:
            raise ValueError("wbits and abits are both 16: nothing would be quantized")
        self._check_numbers()
        if self.kv_cache is not None and self.quantize_attention and self.abits != HIGH_PRECISION_BITS:
            raise ValueError("attention's inputs are quantized already: leave kv_cache out, or quantize_attention")
        if self.target_bits is not None and (not self._weights.chooses or self.wbits == HIGH_PRECISION_BITS):
            raise ValueError("target_bits spreads bits over integers: not with floats, nor with 16-bit weights")
        odd = next((item for item in (self.layer_bits or {}).items() if item[1] not in BITS), None)
        if odd:
            raise ValueError(f"layer_bits of {_shown(odd[0])} = {odd[1]}: integers have 2 to 8 bits")
        if self.method not in PRESETS:
            raise ValueError(f"unknown method {self.method!r}: there are {', '.join(PRESETS)}")
        return self

    def _check_numbers(self) -> None:
        weights, inputs = self._weights, self._inputs
        bits = weights.weights.bits, inputs.inputs.bits
        if inputs is not weights and not (weights.chooses and inputs.beside_integers):
            raise ValueError(f"no runtime takes {inputs.title} activations with {weights.title} weights")
        if not weights.chooses and (self.wbits != bits[0] or self.abits not in (bits[1], HIGH_PRECISION_BITS)):
            raise ValueError(
                f"{weights.title} has {bits[0]} bits a weight, and {bits[1]} or 16 an activation: "
                f"not W{self.wbits}A{self.abits}"
            )
        if not inputs.chooses and self.abits not in (bits[1], HIGH_PRECISION_BITS):
            raise ValueError(f"{inputs.title} has {bits[1]} bits an activation: not {self.abits}")
        if not weights.chooses and self.group_size is not None:
            raise ValueError(f"{weights.title} has groups of its own size; leave the group size out")
        if not inputs.chooses and self.quantize_attention:
            raise ValueError(f"{inputs.title} leaves queries, keys and values alone: set quantize_attention to false")
        gain = self.rotation and self.rotation_rank == 1
        if gain and not weights.chooses and not weights.weights.takes_gain:
            raise ValueError(f"{weights.title}'s scales cannot hold a rotation; switch rotation off")

    @property
    def _weights(self) -> NamedFormat:
        return row_of(self.numbers)

    @property
    def _inputs(self) -> NamedFormat:
        return row_of(self.input_numbers or self.numbers)

    @property
    def scheme(self) -> Scheme:
        weights = inputs = None
        if self.wbits != HIGH_PRECISION_BITS:
            weights = self._weights.for_weights(self.wbits, self.group_size, self.symmetric)
        if self.abits != HIGH_PRECISION_BITS:
            inputs = self._inputs.for_inputs(self.abits, self.activations_symmetric)
        scheme = Scheme.of_formats(weights, inputs, self.quantize_attention)
        if self.kv_cache is not None:
            scheme = replace(scheme, kv_cache=CACHES[self.kv_cache].input_args())
        return replace(scheme, bits=self.layer_bits) if self.layer_bits else scheme

    @property
    def dense(self) -> bool:
        """Whether weights are stored as the floating-point values they were rounded to: no format holds rank k > 1."""
        return self.rotation and self.rotation_rank > 1 and self.wbits != HIGH_PRECISION_BITS

    @property
    def stored_scheme(self) -> Scheme:
        """What the checkpoint declares: `scheme`, without the weights where they are stored dense."""
        return replace(self.scheme, weights=None) if self.dense else self.scheme

    @property
    def format_name(self) -> str:
        """The field's short name of the format: `W4A4`, `W2A16 g64`, `NVFP4A16`, `W3.5A16` on average."""
        cache = "" if self.kv_cache is None else f" KV{self.kv_cache.upper()}"
        if not self._weights.chooses:
            return self._weights.title + ("A16" if self.abits == HIGH_PRECISION_BITS else "") + cache
        wbits = self.wbits if self.target_bits is None else f"{self.target_bits:g}"
        inputs = "" if self._inputs.chooses else f"-{self._inputs.title}"
        return f"W{wbits}A{self.abits}{inputs}" + (f" g{self.group_size}" if self.group_size else "") + cache

    @property
    def learns(self) -> bool:
        return self.epochs > 0 and (self.let or self.lwc or self.rotation or self.rounding == "learned")

    @classmethod
    def preset(
        cls, method: str = "lrquant", paper_exact: bool = False, format: str | None = None, **changes: Any
    ) -> "Recipe":
        """The recipe of a published method, with `changes` to any field (None: leave the preset's).

        `paper_exact` takes the paper's own setting where the evidence here favours another. `format` is the name of a
        number format (`lrquant.formats.presets`), in place of its fields.
        """
        if method not in PRESETS:
            raise UsageError(f"unknown method {method!r}: there are {', '.join(PRESETS)}")
        chosen = with_format(format, changes)
        return cls.parse({"method": method} | _defaults(method, chosen, paper_exact) | chosen)

    @classmethod
    def parse(cls, values: Any) -> "Recipe":
        """A recipe from plain values; the first thing wrong is one line."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "recipe"
            if first["type"] == "extra_forbidden":
                raise UsageError(f"unknown recipe key {where!r}: there are {', '.join(cls.model_fields)}") from None
            value = f" = {_shown(first['input'])}" if first["loc"] else ""
            raise UsageError(f"{where}{value}: {first['msg'].removeprefix('Value error, ')}") from None

    def changed(self, **changes: Any) -> "Recipe":
        """A copy with `changes`, validated (None: leave as it is)."""
        return self.parse(self.model_dump() | {name: value for name, value in changes.items() if value is not None})

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The recipe as YAML text, also written to `path` when given."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """Read a recipe; keys that are left out take the preset's values for the file's `method`."""
        path = Path(path)
        try:
            if path.stat().st_size > _MAX_YAML_BYTES:
                raise UsageError(f"{path}: larger than {_MAX_YAML_BYTES} bytes, this is no recipe")
            values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: cannot read the recipe ({error})") from None
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise UsageError(f"{path}: a recipe is a mapping of option names to values")
        method = values.get("method", "lrquant")
        if not isinstance(method, str) or method not in PRESETS:
            raise UsageError(f"{path}: unknown method {method!r}: there are {', '.join(PRESETS)}")
        return cls.parse(_defaults(method, values) | values)


def with_format(name: str | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` that are not None, and the fields of the format called `name`.

    Raises:
        UsageError: no such format, or a change says otherwise.
    """
    chosen = {key: value for key, value in changes.items() if value is not None}
    if name is None:
        return chosen
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}: there are {', '.join(FORMATS)}")
    for key, value in FORMATS[name].items():
        if chosen.get(key, value) != value:
            raise UsageError(f"{key} = {chosen[key]}: the format {name} has {value}; leave one of the two out")
    return _format_defaults(FORMATS[name]) | FORMATS[name] | chosen


def _shown(value: Any) -> str:
    """`value` in a line of an error, shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a number with more digits than Python prints
        return "a number of thousands of digits"


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases, a few of which can stand for more data than fits into memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases have no place in a recipe")
        return super().compose_node(parent, index)


_NO_LEARNING: dict[str, Any] = {"lwc": False, "epochs": 0, "smooth_attention": False, "smooth_mlp": False}

PRESETS: dict[str, dict[str, Any]] = {
    "rtn": _NO_LEARNING | {"let": False},
    "smoothquant": _NO_LEARNING | {"init": "smoothquant", "shift": "off"},
    "omniquant": {"init": "smoothquant", "loss": "mse", "smooth_mlp": False, "schedule": "constant"},
    "lrquant": {},
    "lrquant+": {"two_branch": True, "dynamic_loss": True, "rotation": True},
    "lrquant-max": {
        "two_branch": True,
        "dynamic_loss": True,
        "rotation": True,
        "rounding": "learned",
        "epochs": 10,
        "batch_size": 8,
        "let_lr": 5e-3,  # offsets are learned for the scales as they are: those had better stay near
    },
}

_PAPER: dict[str, Any] = {
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
    "lrquant+": _PAPER | {"shift": "on", "two_branch": True, "dynamic_loss": True, "rotation": True},
}


def _defaults(method: str, chosen: Mapping[str, Any], paper_exact: bool = False) -> dict[str, Any]:
    """What the preset `method` is for the number format in `chosen`, values that nobody checked yet."""
    bits, row = chosen.get("abits", Recipe.model_fields["abits"].default), _row(chosen.get("numbers"))
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
    samples = chosen.get("nsamples", Recipe.model_fields["nsamples"].default)
    if method in SAMPLES_OF_A_STEP and isinstance(samples, int):
        values["batch_size"] = max(1, min(values["batch_size"], samples // SAMPLES_OF_A_STEP[method]))
    if paper_exact:
        values |= _paper_exact(method, chosen)
    return values | _format_defaults(chosen)


def _row(name: Any) -> NamedFormat:
    """The row called `name`, a value that nobody checked yet; integers' in place of none or an unknown one."""
    default = TABLE[Recipe.model_fields["numbers"].default]
    return TABLE.get(name, default) if isinstance(name, str) else default


def _format_defaults(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What every preset changes for the number formats in `chosen`."""
    weights, inputs = _row(chosen.get("numbers")), _row(chosen.get("input_numbers") or chosen.get("numbers"))
    values = {} if inputs.chooses else {"quantize_attention": False}  # no attention has them
    if not weights.chooses and not weights.weights.takes_gain:
        values["rotation"] = False
    return values | dict(weights.defaults)


def _paper_exact(method: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's setting of `method`; weight-only learns clipping (and rotations) without smoothing."""
    if method not in PAPER_EXACT:
        raise UsageError(f"paper_exact is for {', '.join(PAPER_EXACT)}: {method} learns nothing")
    return PAPER_EXACT[method] | ({"let": False} if chosen.get("abits") == HIGH_PRECISION_BITS else {})


# What a preset changes when activations are left alone: OmniQuant then learns clipping only, as published; beside
# learned rounding LRQuant+'s parts bring nothing more, and tuning does, which rounded activations drown.
WEIGHT_ONLY: dict[str, dict[str, Any]] = {
    "omniquant": {"let": False},
    "lrquant-max": {"two_branch": False, "dynamic_loss": False, "rotation": False, "tuning_epochs": 4},
}

# What a preset changes for activations of few integer bits: an outlier channel leaves the others hardly any of them.
FEW_ACTIVATION_BITS = 6
FEW_BITS: dict[str, dict[str, Any]] = {"lrquant-max": {"orthogonal": ("auto",)}}

# A step takes one of so many samples, up to the preset's batch size: learned rounding would have too few steps with few
# samples (docs/benchmarks.md).
SAMPLES_OF_A_STEP = {"lrquant-max": 16}

# What a preset changes for weights of fewer integer bits than these and for four-bit floats, unless coarse activations
# drown what more epochs bring (docs/benchmarks.md).
FINE_WEIGHT_BITS = 4
COARSE_WEIGHTS: dict[str, dict[str, Any]] = {"lrquant-max": {"epochs": 24}}
