"""A block's number format, described by compressed-tensors' own `QuantizationArgs`.

Weights are integers of 2–8 bits per output channel or per group of input channels, with stored scales;
activations are integers of 2–8 bits per token, their range found at run time. Or both are four-bit floats in small
groups, NVFP4 or MXFP4, as recent hardware multiplies them. Whoever reads the checkpoint later (transformers, vLLM)
reads these same objects.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    preset_name_to_scheme,
)

from lrquant.errors import UsageError
from lrquant.formats.qparams import Numbers

BITS = range(2, 9)
HIGH_PRECISION_BITS = 16  # "16 bits" means: left in the model's own floating-point format


def _check_bits(bits: int, what: str) -> None:
    if bits not in BITS:
        raise UsageError(f"{what} = {bits}: integers have 2 to 8 bits (or 16: not quantized)")


def weight_args(bits: int, group_size: int | None = None, symmetric: bool = False) -> QuantizationArgs:
    """Integer weights: per output channel (`group_size=None`) or per `group_size` input channels."""
    _check_bits(bits, "wbits")
    if group_size is None:
        return QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=QuantizationStrategy.CHANNEL)
    if group_size < 1:
        raise UsageError(f"group size {group_size}: it must be at least 1 (leave it out for one scale per channel)")
    return QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=QuantizationStrategy.GROUP, group_size=group_size
    )


def activation_args(bits: int, symmetric: bool = False) -> QuantizationArgs:
    """Integer activations, one range per token, found at run time."""
    _check_bits(bits, "abits")
    return QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=QuantizationStrategy.TOKEN, dynamic=True, observer=None
    )


def per_token_for_flat_inputs(args: QuantizationArgs, width: int) -> QuantizationArgs:
    """The same per-token quantization for a linear whose input has no batch dimension, (tokens, width).

    compressed-tensors reads the first two dimensions of a `token` input as batch and token, so a flat
    input would share one range over all its tokens. One group as wide as the row says what is meant.
    """
    return args.model_copy(update={"strategy": QuantizationStrategy.GROUP.value, "group_size": width})


@dataclass(frozen=True)
class Scheme:
    """Formats of one model's linears: `weights`, their inputs, and queries, keys and values in attention.

    `None` means left in floating point. Attention inputs are quantized per token and head. `bits` says which linears'
    weights have other bits than `weights`, by name in the model, or in the block (`within`).
    """

    weights: QuantizationArgs | None
    inputs: QuantizationArgs | None = None
    attention: QuantizationArgs | None = None
    bits: Mapping[str, int] = field(default_factory=dict)

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
    def floating(cls, numbers: Numbers, abits: int = HIGH_PRECISION_BITS) -> "Scheme":
        """`Scheme.floating("nvfp4", 4)`: NVFP4 weights and inputs. Attention has no such format and is left alone."""
        preset = preset_name_to_scheme(numbers if abits == 4 else f"{numbers}A16", [])
        return cls(preset.weights, preset.input_activations)

    def within(self, path: str) -> "Scheme":
        """The same for one block, whose linears are called by their names within it."""
        inside = f"{path}."
        named = {name.removeprefix(inside): bits for name, bits in self.bits.items() if name.startswith(inside)}
        return replace(self, bits=named) if self.bits else self

    def of(self, linear: str) -> "Scheme":
        """The scheme of one linear by name."""
        if self.weights is None or linear not in self.bits:
            return self
        return replace(self, weights=self.weights.model_copy(update={"num_bits": self.bits[linear]}))

    @property
    def group_size(self) -> int | None:
        """Input channels that share a scale, of weights or inputs; None: as many as there are."""
        args = self.weights or self.inputs
        return args.group_size if args is not None else None

    @property
    def has_static_inputs(self) -> bool:
        """Whether inputs have a scale that calibration finds: NVFP4's, for the whole tensor."""
        return self.inputs is not None and self.inputs.dynamic == "local"

    def for_linear(self, width: int, flat_input: bool) -> QuantizationScheme:
        """compressed-tensors' scheme of one linear with `width` input features."""
        inputs = self.inputs
        if inputs is not None and flat_input and inputs.strategy == QuantizationStrategy.TOKEN.value:
            inputs = per_token_for_flat_inputs(inputs, width)
        return QuantizationScheme(targets=[], weights=self.weights, input_activations=inputs)
