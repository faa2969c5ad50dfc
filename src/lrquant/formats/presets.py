"""The table of number formats, and the names under which people ask for them.

A row (`NamedFormat`) is what a recipe's `numbers` or `input_numbers` may say. From it follow the names of `--format`,
each of which stands for fields of a recipe:

| name | weights | inputs |
|---|---|---|
| nvfp4, nvfp4a16 | E2M1 in groups of 16 | the same, or 16 bits |
| mxfp4, mxfp4a16 | E2M1 in groups of 32 | the same, or 16 bits |
| fp8, fp8a16 | E4M3, a scale per channel | E4M3, a scale per token at run time, or 16 bits |
| fp8-static | E4M3, a scale per channel | E4M3, one calibrated scale |
| fp8-block | E4M3 in blocks of 128 × 128 | E4M3 in groups of 128 |
| mxfp8, mxfp8a16 | E4M3 in groups of 32 | the same, or 16 bits |
| w4a16-g128 | 4-bit integers, symmetric, groups of 128 | 16 bits |
| w3a16-g128, w2a16-g64 | 3-bit and 2-bit integers, asymmetric, groups of 128 and 64 | 16 bits |
| w4a8-fp8 | 4-bit integers, symmetric, groups of 128 | E4M3, a scale per token at run time |
| w8a8, w4a8, w4a4 | 8-bit or 4-bit integers, symmetric, per channel | 8-bit or 4-bit integers, symmetric |

Which programs run them, and with which kernels, is `lrquant.runtimes`' table.

`register` adds a row: docs/adding-a-format.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from compressed_tensors.quantization import QuantizationArgs

from lrquant.errors import UsageError
from lrquant.formats.number_format import Elements, NumberFormat, Scales, columns_and_rows
from lrquant.settings import HIGH_PRECISION_BITS

TABLE: dict[str, "NamedFormat"] = {}  # by what `numbers` says
FORMATS: dict[str, dict[str, Any]] = {}  # by what `--format` says: fields of a recipe
CACHES: dict[str, NumberFormat] = {}  # by what `kv_cache` says: of keys and values
_ELEMENTS: dict[tuple[str, int], Elements] = {}  # by kind and bits
_SCALES: list[Scales] = []


@dataclass(frozen=True)
class NamedFormat:
    """What a recipe's `numbers` of this name stand for, as weights and as inputs; in capitals it is the format's name.

    `weight_only`: whether NAMEa16, with inputs of 16 bits, is a name too. `beside_integers`: whether runtimes take such
    inputs with integer weights. `defaults`: what every method's preset changes for this format.
    """

    name: str
    weights: NumberFormat
    inputs: NumberFormat
    weight_only: bool = True
    beside_integers: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    chooses: ClassVar[bool] = False  # whether a recipe chooses bits, groups, symmetry and what attention is given

    def for_weights(self, bits: int, group_size: int | None, symmetric: bool) -> NumberFormat:
        """The format of weights; whoever has but one leaves the arguments aside."""
        return self.weights

    def for_inputs(self, bits: int, symmetric: bool) -> NumberFormat:
        return self.inputs

    @property
    def title(self) -> str:
        return self.name.upper()

    @property
    def presets(self) -> dict[str, dict[str, Any]]:
        """Names of `--format`, and the fields of a recipe that they stand for."""
        both = {"numbers": self.name, "wbits": self.weights.bits, "abits": self.inputs.bits}
        alone = {f"{self.name}a16": both | {"abits": HIGH_PRECISION_BITS}} if self.weight_only else {}
        return {self.name: both} | alone


def register(row: NamedFormat, more: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Add `row` to the table; `more` names of `--format` that stand for fields of a recipe.

    Raises:
        UsageError: a name is taken, or checkpoints describe its elements like others.
    """
    names = row.presets | {name: dict(fields) for name, fields in (more or {}).items()}
    taken = next((name for name in (row.name, *names) if name in TABLE or name in FORMATS), None)
    if taken is not None:
        raise UsageError(f"format {taken!r}: the name is taken")
    know(row.weights, row.inputs)
    TABLE[row.name] = row
    FORMATS.update(names)


def know(*formats: NumberFormat) -> None:
    """Let `format_of` find `formats`, and others with the same elements or scales."""
    for own in formats:
        known = _ELEMENTS.setdefault((own.elements.kind, own.bits), own.elements)
        if known != own.elements:
            raise UsageError(f"checkpoints cannot distinguish {own.elements} and {known}")
        if own.scales not in _SCALES:
            _SCALES.append(own.scales)


def format_of(args: QuantizationArgs) -> NumberFormat:
    """The number format that compressed-tensors' `args` describe.

    Raises:
        UsageError: it is none that this table knows.
    """
    elements = _ELEMENTS.get((str(args.type), args.num_bits))
    scales = next((rule for rule in _SCALES if rule.describes(args)), None)
    if elements is None or scales is None:
        what = f"{args.type}{args.num_bits}, {args.strategy}" + (f" of {args.group_size}" if args.group_size else "")
        raise UsageError(f"number format {what}: not known; there are {', '.join(FORMATS)}")
    return NumberFormat(elements, scales, *columns_and_rows(args))


def row_of(name: str) -> NamedFormat:
    """The table's row called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in TABLE:
        raise UsageError(f"numbers {name!r}: there are {', '.join(TABLE)}")
    return TABLE[name]
