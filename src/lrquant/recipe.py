"""The recipe: everything that determines a quantized model besides the model and the text.

A recipe is saved with every result as `recipe.yaml` and reproduces it. Presets (method_presets.py) are the published
methods as rows of one table: all run in the same engine with parts switched on or off.

A setting is one field of `Recipe`, declared by `lrquant.settings.setting`:

    window: int = setting(1, Panel.METHOD, "Neighbouring blocks that are reconstructed together", metavar="N", ge=1)

That is all: `--window N` appears in the panel *Method and its parts* of `lrquant quantize --help` with its default in
every preset, recipes can contain it, and `python scripts/cli_reference.py` adds it to `docs/cli.md`. A preset with
another value has it in `PRESETS` (method_presets.py), or in the tables after it if it depends on the number format. All
types of pydantic are possible: a tuple of literals is given with commas, a tuple of strings by repeating the option; a
mapping has no option (`option=None`). A renamed field gives its earlier name (`formerly="…"`), which stays valid.

Nothing here imports torch, so that help is fast.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from lrquant.errors import RenamedWarning, UsageError
from lrquant.method_presets import (
    DEFAULT_ABITS,
    DEFAULT_NSAMPLES,
    DEFAULT_NUMBERS,
    PRESETS,
    defaults,
    number_formats,
    with_format,
)
from lrquant.recipe_yaml import RecipeLoader, shown
from lrquant.settings import HIGH_PRECISION_BITS, Panel, setting, setting_of

if TYPE_CHECKING:
    from lrquant.formats import NamedFormat, Scheme
    from lrquant.formats.schemes import LinearFormat

RECIPE_FILE = "recipe.yaml"  # beside every result
_MAX_YAML_BYTES = 1 << 20
LINEAR_FORMAT = ("wbits", "abits", "group_size", "symmetric")  # what `formats` may say of some linears


class Recipe(BaseModel):
    """What to quantize, into which format, and how to learn it.

    >>> Recipe.preset("lrquant", wbits=4, abits=4).to_yaml("recipe.yaml")
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = setting(
        "lrquant",
        Panel.METHOD,
        "Preset: rtn, smoothquant, omniquant, lrquant, lrquant+ or lrquant-max",
        metavar="NAME",
    )
    towers: tuple[Literal["vision", "language"], ...] | None = setting(
        None,
        Panel.TARGET,
        "Towers of a multimodal model to quantize: language, vision, or language,vision",
        metavar="NAMES",
        unset="language, or the only one",
    )
    extra: tuple[Literal["head", "projector", "patch_embedding"], ...] = setting(
        (),
        Panel.TARGET,
        "Modules outside the blocks to quantize as well: head, projector, patch_embedding",
        metavar="NAMES",
        formerly="also",
    )
    ignore: tuple[str, ...] = setting(
        (),
        Panel.TARGET,
        "Linears to leave in floating point: a glob over modules' names, such as '*.down_proj'; repeatable",
        metavar="PATTERN",
    )
    only: tuple[str, ...] = setting(
        (),
        Panel.TARGET,
        "Linears to quantize, and no others: a glob over modules' names; repeatable",
        metavar="PATTERN",
        unset="all",
    )

    numbers: str = setting(
        DEFAULT_NUMBERS,
        Panel.FORMAT,
        "Numbers of weights and activations: int for integers, or the name of another format",
        option=None,
    )
    input_numbers: str | None = setting(
        None, Panel.FORMAT, "Numbers of activations, by the same names", option=None, unset="those of the weights"
    )
    wbits: int = setting(4, Panel.FORMAT, "Bits per weight, 2 to 8; 16 leaves weights in 16 bits", metavar="BITS")
    abits: int = setting(DEFAULT_ABITS, Panel.FORMAT, "Bits per activation, 2 to 8; 16 is weight-only", metavar="BITS")
    group_size: int | None = setting(
        None, Panel.FORMAT, "Input channels that share a scale", metavar="CHANNELS", unset="a whole row", ge=1
    )
    symmetric: bool = setting(
        False, Panel.FORMAT, "Quantize weights without zero points, or with them", option="symmetric/asymmetric"
    )
    activations_symmetric: bool = setting(False, Panel.FORMAT, "Quantize activations without zero points", rare=True)
    quantize_attention: bool = setting(
        True, Panel.FORMAT, "Quantize queries, keys and values too, with the bits of activations"
    )
    kv_cache: str | None = setting(
        None,
        Panel.FORMAT,
        "Key-value cache with calibrated scales: fp8 or int8",
        metavar="NAME",
        unset="16 bits",
    )
    target_bits: float | None = setting(
        None,
        Panel.FORMAT,
        "Mixed precision: average bits per weight, scales included; measured errors decide the bits of each linear",
        metavar="BITS",
        unset="the same bits everywhere",
        ge=2,
        le=9,
    )
    store: Literal["source", "half"] = setting(
        "source",
        Panel.FORMAT,
        "Precision of scales and of everything that is not quantized; half: bfloat16 where the source is float32",
        rare=True,
    )
    layer_bits: dict[str, int] | None = setting(
        None, Panel.FORMAT, "Bits of each linear's weights, by name; chosen by mixed precision", option=None
    )
    formats: dict[str, dict[str, int | bool | None]] = setting(
        {},
        Panel.FORMAT,
        "Other formats of some linears: a glob over modules' names → wbits, abits, group_size, symmetric; the last "
        "that fits counts",
        option=None,
    )

    calibration: str = setting(
        "wikitext2",
        Panel.CALIBRATION,
        "Calibration data: wikitext2, ptb, c4, zoo:pydoc, zoo:pycode, a text file or a folder of them; for a vision "
        "model zoo:shapes, a folder of images or a data set on the hub; for both zoo:shapes-vqa or a .jsonl file",
        option="calib",
        metavar="NAME|PATH",
    )
    nsamples: int = setting(DEFAULT_NSAMPLES, Panel.CALIBRATION, "Calibration samples", metavar="N", ge=1, le=1_000_000)
    seqlen: int | None = setting(
        None,
        Panel.CALIBRATION,
        "Tokens per sample",
        metavar="TOKENS",
        unset="2048, or the model's maximum",
        ge=2,
        le=1_000_000,
    )
    bos: Literal["auto", "off"] = setting(
        "auto",
        Panel.CALIBRATION,
        "Begin windows with the BOS token, in calibration and evaluation; auto: if the tokenizer adds it to a text; "
        "off: as in published results",
    )
    all_experts: bool = setting(
        False,
        Panel.CALIBRATION,
        "Calibrate every expert of a mixture on all tokens, whichever its router sends it",
        rare=True,
    )
    seed: int = setting(0, Panel.CALIBRATION, "Seed of the samples and of their order", metavar="N", ge=0, lt=2**63)

    let: bool = setting(True, Panel.METHOD, "Smooth activations by learnable equivalent transformations (LET)")
    init: Literal["log", "smoothquant", "neutral"] = setting(
        "log", Panel.METHOD, "Initial smoothing scales; neutral: one", rare=True
    )
    alpha: float = setting(0.5, Panel.METHOD, "SmoothQuant's migration strength", rare=True, metavar="A", ge=0, le=1)
    shift: Literal["auto", "on", "off"] = setting(
        "auto", Panel.METHOD, "Learn shifts; auto: where the model has biases for them", rare=True
    )
    smooth_attention: bool = setting(
        True, Panel.METHOD, "Smooth between values and output, and between queries and keys", rare=True
    )
    smooth_mlp: bool = setting(True, Panel.METHOD, "Smooth between up and down projections", rare=True)
    lwc: bool = setting(True, Panel.METHOD, "Learn weight clipping (LWC)")
    rotate: tuple[Literal["auto", "stream", "values", "down"], ...] = setting(
        (),
        Panel.METHOD,
        "Rotate activations by orthogonal matrices: stream, values, and at run time down; auto: rotations that cost "
        "nothing at run time",
        metavar="NAMES",
        formerly="orthogonal",
    )
    rotate_by: Literal["hadamard", "random"] = setting(
        "hadamard",
        Panel.METHOD,
        "Rotation matrices: Hadamard with random signs, or random orthogonal",
        rare=True,
        formerly="orthogonal_kind",
    )
    rounding: Literal["nearest", "learned", "gptq"] = setting(
        "nearest", Panel.METHOD, "Round weights to the nearest integer, by learned offsets, or by GPTQ"
    )
    loss: Literal["mse", "mse+nlc", "balanced"] = setting(
        "mse+nlc",
        Panel.METHOD,
        "Reconstruction loss; NLC is the negative logarithm of the cosine; balanced: log error + log NLC",
        rare=True,
    )
    two_branch: bool = setting(
        False, Panel.METHOD, "LRQuant+: also match the full-precision block's output for the same input", rare=True
    )
    dynamic_loss: bool = setting(
        False, Panel.METHOD, "LRQuant+: divide each term of the loss by its running average", rare=True
    )
    rotation_vectors: bool = setting(
        False,
        Panel.METHOD,
        "LRQuant+: learn a gain for each row of the dequantized weights",
        rare=True,
        formerly="rotation",
    )
    rotation_rank: int = setting(
        1,
        Panel.METHOD,
        "Rank of these gains; above 1 they do not fold into scales, and the checkpoint is dense",
        rare=True,
        metavar="K",
        ge=1,
        le=64,
    )

    epochs: int = setting(
        6, Panel.LEARNING, "Epochs over the calibration samples, for each block", metavar="N", ge=0, le=10_000
    )
    batch_size: int = setting(4, Panel.LEARNING, "Samples per step", metavar="N", ge=1)
    let_lr: float | None = setting(
        None,
        Panel.LEARNING,
        "Learning rate of smoothing",
        rare=True,
        metavar="RATE",
        unset="depends on the number of steps",
        gt=0,
        le=1,
    )
    lwc_lr: float | None = setting(
        None,
        Panel.LEARNING,
        "Learning rate of clipping",
        rare=True,
        metavar="RATE",
        unset="depends on the number of steps",
        gt=0,
        le=1,
    )
    rounding_lr: float | None = setting(
        None,
        Panel.LEARNING,
        "Learning rate of rounding",
        rare=True,
        metavar="RATE",
        unset="depends on the number of steps",
        gt=0,
        le=1,
    )
    schedule: Literal["constant", "cosine"] = setting(
        "cosine", Panel.LEARNING, "Schedule of the learning rates over a block's steps", rare=True
    )
    window: int = setting(
        1, Panel.LEARNING, "Successive blocks that are learned together; 1: each by itself", metavar="N", ge=1, le=16
    )
    window_overlap: int = setting(
        0,
        Panel.LEARNING,
        "Blocks that successive windows share",
        rare=True,
        metavar="N",
        ge=0,
        le=15,
    )
    early_stop: float = setting(
        0.0,
        Panel.LEARNING,
        "Stop a block when two epochs lower its loss by less than this share; 0: never",
        rare=True,
        metavar="SHARE",
        ge=0,
        lt=1,
    )
    tuning_epochs: int = setting(
        0,
        Panel.LEARNING,
        "Epochs of end-to-end tuning, which learns the full model's scales and norms after all blocks",
        metavar="N",
        ge=0,
        le=10_000,
    )
    tuning_lr: float = setting(
        1e-3, Panel.LEARNING, "Learning rate of end-to-end tuning", rare=True, metavar="RATE", gt=0, le=1
    )

    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", Panel.MACHINE, "Precision of the computation; auto: float32 on CPUs, bfloat16 elsewhere"
    )
    threads: int | None = setting(
        None,
        Panel.MACHINE,
        "CPU threads; another number rounds sums differently and gives other bytes",
        unset="PyTorch's choice",
        rare=True,
        ge=1,
        le=4096,
    )
    products: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        Panel.MACHINE,
        "Precision of matrix products while learning; auto: bfloat16 if that is faster on this machine",
        rare=True,
    )
    kernels: Literal["auto", "eager", "compiled", "triton"] = setting(
        "auto", Panel.MACHINE, "Kernels of fake quantization while learning; all give the same integers", rare=True
    )

    @model_validator(mode="before")
    @classmethod
    def _earlier_names(cls, values: Any) -> Any:
        return renamed(values) if isinstance(values, Mapping) else values

    @field_validator("shift", mode="before")
    @classmethod
    def _yaml_reads_on_as_true(cls, shift: Any) -> Any:
        return {True: "on", False: "off"}.get(shift, shift) if isinstance(shift, bool) else shift

    @field_validator("bos", mode="before")
    @classmethod
    def _yaml_reads_off_as_false(cls, bos: Any) -> Any:
        return "off" if bos is False else bos

    @field_validator("numbers", "input_numbers")
    @classmethod
    def _known_numbers(cls, name: str | None) -> str | None:
        if name is not None and name not in number_formats():
            raise ValueError(f"there are {', '.join(number_formats())}")
        return name

    @field_validator("kv_cache")
    @classmethod
    def _known_cache(cls, name: str | None) -> str | None:
        from lrquant.formats.presets import CACHES

        if name is not None and name not in CACHES:
            raise ValueError(f"there are {', '.join(CACHES)}")
        return name

    @field_validator("wbits", "abits")
    @classmethod
    def _known_bits(cls, bits: int) -> int:
        from lrquant.formats.integers import BITS

        if bits not in BITS and bits != HIGH_PRECISION_BITS:
            raise ValueError("integers have 2 to 8 bits, and 16 leaves a tensor unquantized")
        return bits

    @field_validator("ignore", "only", mode="before")
    @classmethod
    def _one_pattern(cls, patterns: Any) -> Any:
        return (patterns,) if isinstance(patterns, str) else patterns

    @model_validator(mode="after")
    def _something_to_do(self) -> "Recipe":
        if self.wbits == self.abits == HIGH_PRECISION_BITS and self.kv_cache is None:
            raise ValueError("wbits and abits are both 16: nothing would be quantized")
        self._check_numbers()
        self._check_formats()
        if self.kv_cache is not None and self.quantize_attention and self.abits != HIGH_PRECISION_BITS:
            raise ValueError("attention inputs are already quantized: leave out kv_cache or quantize_attention")
        if self.target_bits is not None and (not self._weights.chooses or self.wbits == HIGH_PRECISION_BITS):
            raise ValueError("target_bits works with integer weights only, not with floats or 16-bit weights")
        from lrquant.formats.integers import BITS

        odd = next((item for item in (self.layer_bits or {}).items() if item[1] not in BITS), None)
        if odd:
            raise ValueError(f"layer_bits of {shown(odd[0])} = {odd[1]}: integers have 2 to 8 bits")
        if self.window_overlap >= self.window:
            raise ValueError(
                f"window_overlap {self.window_overlap} of window {self.window}: the overlap must be smaller"
            )
        if self.window > 1 and self.rounding == "gptq":
            raise ValueError(f"window {self.window}: GPTQ works on one block at a time; use learned rounding")
        if self.method not in PRESETS:
            raise ValueError(f"unknown method {self.method!r}: there are {', '.join(PRESETS)}")
        return self

    def _check_numbers(self) -> None:
        weights, inputs = self._weights, self._inputs
        bits = weights.weights.bits, inputs.inputs.bits
        if inputs is not weights and not (weights.chooses and inputs.beside_integers):
            raise ValueError(f"no runtime supports {inputs.title} activations with {weights.title} weights")
        if not weights.chooses and (self.wbits != bits[0] or self.abits not in (bits[1], HIGH_PRECISION_BITS)):
            raise ValueError(
                f"{weights.title} has {bits[0]} bits per weight, and {bits[1]} or 16 per activation: "
                f"not W{self.wbits}A{self.abits}"
            )
        if not inputs.chooses and self.abits not in (bits[1], HIGH_PRECISION_BITS):
            raise ValueError(f"{inputs.title} has {bits[1]} bits per activation, not {self.abits}")
        if not weights.chooses and self.group_size is not None:
            raise ValueError(f"{weights.title} has a fixed group size; leave group_size out")
        if not inputs.chooses and self.quantize_attention:
            raise ValueError(
                f"{inputs.title} does not quantize queries, keys and values: set quantize_attention to false"
            )
        gain = self.rotation_vectors and self.rotation_rank == 1
        if gain and not weights.chooses and not weights.weights.takes_gain:
            raise ValueError(f"{weights.title}'s scales cannot hold a rotation vector: set rotation_vectors to false")

    def _check_formats(self) -> None:
        if not self.formats:
            return
        if not (self._weights.chooses and self._inputs.chooses) or self.wbits == HIGH_PRECISION_BITS:
            raise ValueError("formats of some linears are integers: not with floats, nor with 16-bit weights")
        if self.target_bits is not None or self.dense:
            raise ValueError("formats of some linears: not with target_bits, nor with rotation_rank above 1")
        for pattern, own in self.formats.items():
            odd = next((name for name in own if name not in LINEAR_FORMAT), None)
            if odd or not own:
                raise ValueError(f"formats of {shown(pattern)}: {odd or 'nothing'}; give {', '.join(LINEAR_FORMAT)}")
            if own.get("wbits") == HIGH_PRECISION_BITS:
                raise ValueError(f"formats of {shown(pattern)}: to leave linears in floating point there is ignore")
            self._of_linears(own)

    def _of_linears(self, own: Mapping[str, int | bool | None]) -> "LinearFormat":
        """The formats of linears that have `own` in place of this recipe's."""
        from lrquant.formats.schemes import LinearFormat, activation_args, weight_args

        values = {name: getattr(self, name) for name in LINEAR_FORMAT} | dict(own)
        inputs = None
        if values["abits"] != HIGH_PRECISION_BITS:
            inputs = activation_args(values["abits"], self.activations_symmetric)
        return LinearFormat(weight_args(values["wbits"], values["group_size"], values["symmetric"]), inputs)

    @property
    def _weights(self) -> "NamedFormat":
        return number_formats()[self.numbers]

    @property
    def _inputs(self) -> "NamedFormat":
        return number_formats()[self.input_numbers or self.numbers]

    @property
    def scheme(self) -> "Scheme":
        """The number formats of weights, inputs and attention."""
        from lrquant.formats import Scheme

        weights = inputs = None
        if self.wbits != HIGH_PRECISION_BITS:
            weights = self._weights.for_weights(self.wbits, self.group_size, self.symmetric)
        if self.abits != HIGH_PRECISION_BITS:
            inputs = self._inputs.for_inputs(self.abits, self.activations_symmetric)
        scheme = Scheme.of_formats(weights, inputs, self.quantize_attention)
        if self.kv_cache is not None:
            from lrquant.formats.presets import CACHES

            scheme = replace(scheme, kv_cache=CACHES[self.kv_cache].input_args())
        formats = tuple((pattern, self._of_linears(own)) for pattern, own in self.formats.items())
        scheme = replace(scheme, ignore=self.ignore, only=self.only, formats=formats)
        return replace(scheme, bits=self.layer_bits) if self.layer_bits else scheme

    @property
    def dense(self) -> bool:
        """Whether weights are stored as the floating-point values they were rounded to: no format holds rank k > 1."""
        return self.rotation_vectors and self.rotation_rank > 1 and self.wbits != HIGH_PRECISION_BITS

    @property
    def stored_scheme(self) -> "Scheme":
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
        return self.epochs > 0 and (self.let or self.lwc or self.rotation_vectors or self.rounding == "learned")

    @classmethod
    def preset(
        cls, method: str = "lrquant", paper_exact: bool = False, format: str | None = None, **changes: Any
    ) -> "Recipe":
        """The recipe of a published method, with `changes` to any field (None: keep the preset's value).

        `paper_exact` uses the paper's settings where the preset has others. `format` is the name of a number format
        (`lrquant.formats.presets`) and replaces its fields.
        """
        if method not in PRESETS:
            raise UsageError(f"unknown method {method!r}: there are {', '.join(PRESETS)}")
        chosen = with_format(format, renamed(changes))
        return cls.parse({"method": method} | defaults(method, chosen, paper_exact) | chosen)

    @classmethod
    def parse(cls, values: Any) -> "Recipe":
        """A recipe from plain values; the first invalid value is reported in one line."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "recipe"
            if first["type"] == "extra_forbidden":
                raise UsageError(f"unknown recipe key {where!r}: there are {', '.join(cls.model_fields)}") from None
            value = f" = {shown(first['input'])}" if first["loc"] else ""
            raise UsageError(f"{where}{value}: {first['msg'].removeprefix('Value error, ')}") from None

    def changed(self, **changes: Any) -> "Recipe":
        """A validated copy with `changes` (None: no change)."""
        given = {name: value for name, value in renamed(changes).items() if value is not None}
        return self.parse(self.model_dump() | given)

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
            if path.exists() and not path.is_file():  # a pipe or a device may never end
                raise UsageError(f"{path}: cannot read the recipe (it is not a file)")
            if path.stat().st_size > _MAX_YAML_BYTES:
                raise UsageError(f"{path}: larger than {_MAX_YAML_BYTES} bytes, which is too large for a recipe")
            values = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: cannot read the recipe ({error})") from None
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise UsageError(f"{path}: a recipe is a mapping of option names to values")
        values = renamed(values)
        method = values.get("method", "lrquant")
        if not isinstance(method, str) or method not in PRESETS:
            raise UsageError(f"{path}: unknown method {method!r}: there are {', '.join(PRESETS)}")
        return cls.parse(defaults(method, values) | values)


def renamed(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """`values` with current field names instead of earlier ones; each gives a warning.

    Raises:
        UsageError: both names of a field are there.
    """
    result = dict(values)
    for name, field in Recipe.model_fields.items():
        former = setting_of(name, field).formerly
        if former not in result:
            continue
        if name in result:
            raise UsageError(f"{former} is now called {name}: give only one of them")
        warnings.warn(f"{former} is now called {name}", RenamedWarning, stacklevel=3)
        result[name] = result.pop(former)
    return result
