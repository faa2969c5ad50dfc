"""A model's number formats, described by compressed-tensors' own `QuantizationArgs`.

Weights have a scale per output channel, per group of input channels or per block, with stored scales; activations one
per token or per group of channels, found at run time, or one that calibration finds. Which formats there are is the
table's matter (presets.py). Whoever reads the checkpoint later (transformers, vLLM) reads these same objects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypeVar

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy

from lrquant.errors import UsageError
from lrquant.formats.integers import BITS, integers
from lrquant.formats.number_format import NumberFormat, columns_and_rows
from lrquant.formats.presets import HIGH_PRECISION_BITS, format_of

_Linear = TypeVar("_Linear")


def _check_bits(bits: int, what: str) -> None:
    if bits not in BITS:
        raise UsageError(f"{what} = {bits}: integers have 2 to 8 bits (or 16: not quantized)")


def weight_args(bits: int, group_size: int | None = None, symmetric: bool = False) -> QuantizationArgs:
    """Integer weights: per output channel (`group_size=None`) or per `group_size` input channels."""
    _check_bits(bits, "wbits")
    if group_size is not None and group_size < 1:
        raise UsageError(f"group size {group_size}: it must be at least 1 (leave it out for one scale per channel)")
    return integers(bits, symmetric, group_size).weight_args()


def activation_args(bits: int, symmetric: bool = False) -> QuantizationArgs:
    """Integer activations, one range per token, found at run time."""
    _check_bits(bits, "abits")
    return integers(bits, symmetric).input_args()


def per_token_for_flat_inputs(args: QuantizationArgs, width: int) -> QuantizationArgs:
    """The same per-token quantization for a linear whose input is not (batch, tokens, width).

    compressed-tensors reads the first two dimensions of a `token` input as batch and token. A flat input, (tokens,
    width), or one of four dimensions (latent attention) would share a range over several tokens. One group as wide as
    the row says what is meant.
    """
    return args.model_copy(update={"strategy": QuantizationStrategy.GROUP.value, "group_size": width})


@dataclass(frozen=True)
class AttentionScheme:
    """Formats of what attention is given: queries, and keys and values, which runtimes keep in a cache."""

    queries: QuantizationArgs | None
    cache: QuantizationArgs | None


def fits(pattern: str, name: str) -> bool:
    """Whether the glob `pattern` is the name of a module, or of one around it: `*.mlp` fits `layers.0.mlp.up_proj`."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(len(parts), 0, -1))


@dataclass(frozen=True)
class LinearFormat:
    """Formats of linears that have others than the model's."""

    weights: QuantizationArgs | None
    inputs: QuantizationArgs | None


@dataclass(frozen=True)
class Scheme:
    """Formats of one model's linears: `weights`, their inputs, and queries, keys and values in attention.

    `None` means left in floating point. Attention inputs are quantized per token and head; or keys and values alone, as
    the cache keeps them, `kv_cache`: by one calibrated scale for each of the two.

    Linears differ by their names in the model: `ignore` and `only` are patterns of those that are left in floating
    point and of those that are not; `formats` are patterns with formats of their own, of which the last that fits
    counts; `bits` says which linears' weights have other bits, by name in the model, or in the block (`within`).
    """

    weights: QuantizationArgs | None
    inputs: QuantizationArgs | None = None
    attention: QuantizationArgs | None = None
    bits: Mapping[str, int] = field(default_factory=dict)
    kv_cache: QuantizationArgs | None = None
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    formats: tuple[tuple[str, LinearFormat], ...] = ()
    path: str = ""  # of the block within which linears are called by their names

    @classmethod
    def integer(
        cls,
        wbits: int,
        abits: int = HIGH_PRECISION_BITS,
        group_size: int | None = None,
        symmetric: bool = False,
        activations_symmetric: bool = False,
        quantize_attention: bool = False,
    ) -> "Scheme":
        """`Scheme.integer(4, 4)` is W4A4; `Scheme.integer(3, group_size=128)` is W3A16 g128."""
        inputs = None if abits == HIGH_PRECISION_BITS else activation_args(abits, activations_symmetric)
        weights = None if wbits == HIGH_PRECISION_BITS else weight_args(wbits, group_size, symmetric)
        return cls(weights, inputs, inputs if quantize_attention else None)

    @classmethod
    def of_formats(
        cls, weights: NumberFormat | None, inputs: NumberFormat | None = None, quantize_attention: bool = False
    ) -> "Scheme":
        """`weights` and `inputs` of all linears; attention has the inputs' format, or none."""
        args = None if inputs is None else inputs.input_args()
        return cls(None if weights is None else weights.weight_args(), args, args if quantize_attention else None)

    def within(self, path: str) -> "Scheme":
        """The same for one block, whose linears are called by their names within it."""
        inside = f"{path}."
        if self.ignore or self.only or self.formats:
            self = replace(self, path=path)
        named = {name.removeprefix(inside): bits for name, bits in self.bits.items() if name.startswith(inside)}
        return replace(self, bits=named) if self.bits else self

    def of(self, linear: str) -> "Scheme":
        """The scheme of one linear by name."""
        if self.leaves(linear):
            return replace(self, weights=None, inputs=None)
        own = [format for pattern, format in self.formats if fits(pattern, self._full_name(linear))]
        found = replace(self, weights=own[-1].weights, inputs=own[-1].inputs) if own else self
        if found.weights is None or linear not in self.bits:
            return found
        return replace(found, weights=found.weights.model_copy(update={"num_bits": self.bits[linear]}))

    def _full_name(self, linear: str) -> str:
        return f"{self.path}.{linear}" if self.path else linear

    def leaves(self, linear: str) -> bool:
        """Whether a linear stays in floating point, its input too."""
        name = self._full_name(linear)
        chosen = not self.only or any(fits(pattern, name) for pattern in self.only)
        return not chosen or any(fits(pattern, name) for pattern in self.ignore)

    def chosen(self, linears: Mapping[str, _Linear]) -> dict[str, _Linear]:
        """Those of `linears`, by name, that are not left in floating point."""
        return {name: linear for name, linear in linears.items() if not self.leaves(name)}

    @property
    def mixed(self) -> bool:
        """Whether quantized linears have different formats."""
        return bool(self.bits or self.formats)

    @property
    def all_inputs(self) -> Sequence[QuantizationArgs]:
        """Every format that some linear's input has."""
        formats = (self.inputs, *(own.inputs for _, own in self.formats))
        return [args for args in formats if args is not None]

    @property
    def group_size(self) -> int | None:
        """Input channels that share a scale, of weights or inputs; None: as many as there are."""
        args = self.weights or self.inputs
        return columns_and_rows(args)[0] if args is not None else None

    @property
    def attention_inputs(self) -> AttentionScheme | None:
        """What of attention's inputs is quantized; None: nothing."""
        cache = self.kv_cache or self.attention
        return None if cache is None else AttentionScheme(self.attention, cache)

    @property
    def has_static_inputs(self) -> bool:
        """Whether inputs have a global scale, which calibration finds."""
        return self.inputs is not None and format_of(self.inputs).scales.has_global

    def for_linear(self, width: int, flat_input: bool) -> QuantizationScheme:
        """compressed-tensors' scheme of one linear with `width` input features."""
        inputs = self.inputs
        if inputs is not None and flat_input and inputs.strategy == QuantizationStrategy.TOKEN.value:
            inputs = per_token_for_flat_inputs(inputs, width)
        return QuantizationScheme(targets=[], weights=self.weights, input_activations=inputs)
