"""The properties of a checkpoint's number format that decide whether a program runs it. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OWN_METHOD = "lrquant"  # quant_method of checkpoints that need lrquant to run


@dataclass(frozen=True)
class Numbers:
    """compressed-tensors' arguments of weights or inputs, as far as they matter here."""

    kind: str  # int or float
    bits: int
    symmetric: bool = True
    strategy: str = "channel"
    group_size: int | None = None  # values of a row that share a scale; None: all of them

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Numbers":
        """From the entry of a config.json."""
        size = values.get("group_size")
        by_size = "tensor" if size is None else "group" if size > 0 else "channel"
        return cls(
            kind=str(values.get("type", "int")),
            bits=int(values.get("num_bits", 8)),
            symmetric=bool(values.get("symmetric", True)),
            strategy=str(values.get("strategy") or by_size),
            group_size=size if size is not None and size > 0 else None,
        )


@dataclass(frozen=True)
class StoredFormat:
    """The numbers of a checkpoint's linears, as they lie on disk."""

    weights: Numbers | None
    inputs: Numbers | None
    container: str  # compressed-tensors' format
    pads_zero_points: bool = False  # to the shape that transformers reserves
    attention: bool = False  # whether queries, keys and values were rounded while learning
    needs_lrquant: bool = False  # added biases, or inputs transformed at run time
    all_bits: tuple[int, ...] = ()  # where linears differ
    model_type: str | None = None  # None: not known yet

    @property
    def wbits(self) -> int:
        return 16 if self.weights is None else self.weights.bits

    @property
    def abits(self) -> int:
        return 16 if self.inputs is None else self.inputs.bits

    @property
    def integers(self) -> bool:
        """Whether weights are integers, and inputs too where they are quantized."""
        return all(numbers is None or numbers.kind == "int" for numbers in (self.weights, self.inputs))

    @property
    def group_size(self) -> int | None:
        return self.weights.group_size if self.weights is not None else None

    @property
    def symmetric(self) -> bool:
        return self.weights is None or self.weights.symmetric

    @property
    def symmetric_inputs(self) -> bool:
        return self.inputs is None or self.inputs.symmetric


def format_of_config(config: Mapping[str, Any], attention: bool = False) -> StoredFormat:
    """What the checkpoint with this config.json holds; `attention`: whether its recipe rounds queries and keys too."""
    quantization = config.get("quantization_config") or {}
    groups = list((quantization.get("config_groups") or {}).values())
    first = next((group for group in groups if group.get("weights")), groups[0] if groups else {})
    weights, inputs = first.get("weights"), first.get("input_activations")
    numbers = Numbers.of(weights) if weights else None
    bits = {int(group["weights"]["num_bits"]) for group in groups if group.get("weights")}
    container = str(first.get("format") or quantization.get("format") or "dense")
    packed = numbers is not None and inputs is not None and container == "pack-quantized"
    return StoredFormat(
        weights=numbers,
        inputs=Numbers.of(inputs) if inputs else None,
        container=container,
        pads_zero_points=packed and numbers is not None and not numbers.symmetric,
        attention=attention,
        needs_lrquant=quantization.get("quant_method") == OWN_METHOD,
        all_bits=tuple(sorted(bits)) if len(bits) > 1 else (),
        model_type=str(config.get("lrquant_base_model_type", config.get("model_type"))),
    )
