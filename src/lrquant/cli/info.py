"""`lrquant info`: facts about a checkpoint, from its configuration and the headers of its weight files."""

import json
import math
import re
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from lrquant.cli import console
from lrquant.cli.quantize import JsonFile
from lrquant.errors import LrquantError, UsageError
from lrquant.runtimes import format_of_config, verdicts

_MAX_HEADER = 100 << 20


@dataclass
class Facts:
    """A checkpoint as its files describe it."""

    path: str
    model_type: str
    architecture: str
    base: str | None
    method: str | None  # None: not written by lrquant
    format: str  # W4A4, W4A16 g128
    container: str
    weights: str
    activations: str
    attention: str
    calibration: str | None
    bytes: int
    parameters: int  # of quantized linears
    bits_per_weight: float
    quantized_linears: int
    left_alone: list[str]  # linears that stay in floating point
    runs: dict[str, str] = field(default_factory=dict)  # program → how
    total_parameters: int = 0  # of the whole checkpoint
    floating_point: dict[str, str] = field(default_factory=dict)  # why → which modules, where the model card says it

    @property
    def share(self) -> float:
        """Of the checkpoint's parameters, those that are quantized."""
        return self.parameters / max(1, self.total_parameters)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"quantized_share": self.share}


def info(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized checkpoint.")],
    json: JsonFile = None,
) -> None:
    """Describe the quantized checkpoint DIR: method, format, bits, layers, and the programs that run it."""
    console.check_output(json)
    facts = describe(directory)
    rows = [
        ["model", f"{facts.architecture} ({facts.model_type})"],
        ["base model", facts.base or "unknown"],
        ["method", facts.method or "unknown: not written by lrquant"],
        ["format", f"{facts.format}, {facts.container}"],
        ["weights", facts.weights],
        ["activations", facts.activations],
        ["queries, keys, values", facts.attention],
        ["calibration", facts.calibration or "unknown"],
        ["size", console.megabytes(facts.bytes)],
        ["bits per quantized weight", f"{facts.bits_per_weight:.3f}, scales and zero points included"],
        ["quantized linears", f"{facts.quantized_linears}, {facts.parameters / 1e6:.1f} million weights"],
        ["quantized", f"{facts.share:.1%} of {facts.total_parameters / 1e6:,.1f} million parameters"],
        *(
            [[f"in floating point: {why}", names] for why, names in facts.floating_point.items()]
            or [["left in floating point", ", ".join(facts.left_alone) or "none"]]
        ),
        *([f"runs in {program}", how] for program, how in facts.runs.items()),
    ]
    console.table(str(directory), ["", ""], rows, words=(0, 1))
    console.write_json(json, facts.as_dict())


def describe(directory: Path) -> Facts:
    """Facts about the quantized checkpoint in `directory`.

    Raises:
        UsageError: there is none.
        LrquantError: a file of it is damaged.
    """
    if not (directory / "config.json").is_file():
        what = "this folder has no config.json, so it is not a model" if directory.is_dir() else "no such folder"
        raise UsageError(f"{directory}: {what}")
    config = _read_json(directory / "config.json")
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") not in ("compressed-tensors", "lrquant"):
        raise UsageError(f"{directory}: not a compressed-tensors checkpoint; lrquant quantize makes one from it")
    groups = list((quantization.get("config_groups") or {}).values())
    weights = next((group["weights"] for group in groups if group.get("weights")), None)
    inputs = next((group["input_activations"] for group in groups if group.get("input_activations")), None)
    recipe = _read_yaml(directory / "recipe.yaml")
    card = _card_metadata(directory / "README.md")
    tensors, size = _tensors(directory)
    packed = {name.rpartition(".")[0] for name in tensors if name.endswith((".weight_scale", ".weight_packed"))}
    parameters, bits, packed_bits = 0, 0, (weights or {}).get("num_bits", 16)
    for linear in packed:
        kinds = (f"{linear}.weight", f"{linear}.weight_shape")
        known = next((tensors[name].elements for name in kinds if name in tensors), None)
        # Packed floats have no shape beside them, and no bit between them.
        parameters += 8 * tensors[f"{linear}.weight_packed"].bytes // packed_bits if known is None else known
        parts = [f"{linear}.weight{part}" for part in ("", "_packed", "_scale", "_zero_point", "_global_scale")]
        bits += sum(8 * tensors[part].bytes for part in parts if part in tensors)
    dense = sum(tensor.elements for name, tensor in tensors.items() if not _is_part(name, packed))
    said = card.get("lrquant")
    reasons = said.get("floating_point") if isinstance(said, dict) else None
    wbits, abits = (weights or {}).get("num_bits", 16), (inputs or {}).get("num_bits", 16)
    group_size = (weights or {}).get("group_size")
    numbers = f"-{recipe['input_numbers'].upper()}" if isinstance(recipe.get("input_numbers"), str) else ""
    groups_of = f" g{group_size}" if group_size else ""
    short = f"W{recipe.get('wbits', wbits)}A{recipe.get('abits', abits)}{numbers}{groups_of}"
    if weights is not None and weights.get("type") == "float":
        scales = {"torch.float8_e4m3fn": "NV", "torch.uint8": "MX"}.get(str(weights.get("scale_dtype")), "")
        short = str(recipe.get("numbers", f"{scales}FP{wbits}")).upper() + ("A16" if inputs is None else "")
    widths = sorted({group["weights"]["num_bits"] for group in groups if group.get("weights")})
    if recipe.get("target_bits"):
        short = f"W{recipe['target_bits']:g}A{abits}{groups_of}"
    attention = "floating point"
    if quantization.get("kv_cache_scheme"):
        attention = f"keys and values in the cache: {_described(quantization['kv_cache_scheme'])}"
        short += f" KV{str(recipe.get('kv_cache', '')).upper()}"
    elif recipe.get("quantize_attention") and abits != 16:
        attention = f"{abits} bits per token and head, in lrquant.load"
    return Facts(
        path=str(directory),
        model_type=str(config.get("lrquant_base_model_type", config.get("model_type", "unknown"))),
        architecture=", ".join(config.get("architectures") or ["unknown"]),
        base=card.get("base_model") or _base_of_run(directory),
        method=recipe.get("method"),
        format=short,
        container=f"{quantization['quant_method']} {quantization.get('format', '')}".strip(),
        weights=_described(weights) + (f"; linears of {', '.join(map(str, widths))} bits" if widths[1:] else ""),
        activations=_described(inputs),
        attention=attention,
        calibration=_calibration(recipe),
        bytes=size,
        parameters=parameters,
        bits_per_weight=bits / parameters if parameters else 16.0,
        quantized_linears=len(packed),
        left_alone=sorted({re.sub(r"\.\d+\.", ".*.", name) for name in quantization.get("ignore") or []}),
        runs={name: str(verdict) for name, verdict in verdicts(format_of_config(config)).items()},
        total_parameters=parameters + dense,
        floating_point={str(why): str(names) for why, names in reasons.items()} if isinstance(reasons, dict) else {},
    )


def _is_part(name: str, linears: set[str]) -> bool:
    """Whether the tensor `name` belongs to one of the quantized `linears` and is no bias."""
    linear, _, own = name.rpartition(".")
    return linear in linears and own != "bias"


def _described(args: dict[str, Any] | None) -> str:
    if args is None:
        return "floating point"
    kind = args.get("type", "int")
    where = {
        "channel": "per output channel",
        "group": f"per group of {args.get('group_size')}",
        "tensor_group": f"per group of {args.get('group_size')}, and one scale per tensor",
        "block": f"per block of {' × '.join(map(str, args.get('block_structure') or []))}",
        "token": "per token, range computed at run time",
        "tensor": "per tensor",
    }.get(str(args.get("strategy")), str(args.get("strategy")))
    return f"{kind}{args.get('num_bits')}, {'symmetric' if args.get('symmetric') else 'asymmetric'}, {where}"


def _calibration(recipe: dict[str, Any]) -> str | None:
    if "calibration" not in recipe:
        return None
    length = f" of {recipe['seqlen']} tokens" if recipe.get("seqlen") else ""
    return f"{recipe.get('nsamples')} samples{length} of {recipe['calibration']}, seed {recipe.get('seed')}"


@dataclass(frozen=True)
class _Tensor:
    bytes: int
    elements: int  # of a packed weight's shape entry: the elements of the weight


def _tensors(directory: Path) -> tuple[dict[str, _Tensor], int]:
    """Every tensor from the files' headers, and the bytes of all tensors.

    The shape of a packed weight is a separate tensor of two integers, the only values that are read.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{directory}: no *.safetensors files here")
    found: dict[str, _Tensor] = {}
    for path in files:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > _MAX_HEADER:
                    raise ValueError("its header is too long")
                header = json.loads(file.read(length))
                header.pop("__metadata__", None)
                for name, entry in header.items():
                    begin, end = entry["data_offsets"]
                    shape = entry["shape"]
                    if name.endswith("_shape"):
                        file.seek(8 + length + begin)
                        shape = struct.unpack(f"<{(end - begin) // 8}q", file.read(end - begin))
                    found[name] = _Tensor(end - begin, math.prod(shape))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise LrquantError(f"{path}: damaged ({error}); download or create it again") from None
    return found, sum(tensor.bytes for tensor in found.values())


def _base_of_run(directory: Path) -> str | None:
    """The model that the report names; local ones are not in the card's metadata."""
    from lrquant.report.run import FOLDER, RUN_FILE, read_run

    if not (directory / FOLDER / RUN_FILE).is_file():
        return None
    run = read_run(directory)
    return run.reference or run.model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LrquantError(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise LrquantError(f"{path}: not a configuration")
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
    """A small YAML file beside the checkpoint; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LrquantError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    return values if isinstance(values, dict) else {}


def _card_metadata(path: Path) -> dict[str, Any]:
    """The YAML block at the head of a model card."""
    found = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8"), re.S) if path.is_file() else None
    try:
        values = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        values = {}
    return values if isinstance(values, dict) else {}
