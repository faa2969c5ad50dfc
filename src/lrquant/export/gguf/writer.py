"""One GGUF file from a checkpoint: headers say what each tensor becomes; then one tensor at a time is in memory."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrquant.errors import LrquantError, UsageError
from lrquant.export.exporter import Exported
from lrquant.export.gguf.blocks import MOST_ERROR, largest_error, pack
from lrquant.export.gguf.families import GgufFamily, context_length, describe, family_of, head_size, rope_of
from lrquant.export.gguf.tokenizer import describe_tokenizer
from lrquant.formats.fake_quant import QuantizedWeight
from lrquant.loading.pretrained import load_config
from lrquant.loading.stored_weights import StoredWeights
from lrquant.runtime.files import check_sums, write_durably
from lrquant.runtimes.llama_cpp import BLOCK, BlockFormat, block_format
from lrquant.runtimes.stored_format import Numbers

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SUFFIXES = (".weight", ".bias")
_CACHE = (".k_scale", ".v_scale")  # of a key-value cache that vLLM would quantize
_LEFT_OUT = ("rotary_emb.inv_freq", *_CACHE)


@dataclass(frozen=True)
class _Planned:
    name: str  # GGUF's
    type: str  # gguf.GGMLQuantizationType's
    shape: tuple[int, ...]
    read: Callable[[], tuple[NDArray[Any], float]]  # its bytes or numbers, and its error


def export_gguf(folder: Path, target: Path, dtype: str = "f16") -> Exported:
    """Write the checkpoint in `folder` as the GGUF file `target`; one that is not quantized becomes `dtype`.

    Integers keep their values and scales (blocks.py); each weight is dequantized again by gguf's own code and compared.
    `dtype` (f16, bf16, f32 or q8_0) is what embeddings, head and other matrices become that are not quantized. Norms
    and biases are float32.

    Raises:
        UsageError: llama.cpp cannot hold this checkpoint, or gguf is not installed.
        LrquantError: a file is damaged, or `target` cannot be written. Nothing is left behind.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise UsageError("GGUF needs the package gguf: pip install 'lrquant[gguf]'") from None
    stored = StoredWeights(folder)
    _check_plain(stored)
    check_sums(folder)
    config = load_config(str(folder))
    family = family_of(config)
    planner = _Planner(stored, config, family, dtype)
    plan = planner.plan()
    errors = []

    def write(path: Path) -> None:
        writer = GGUFWriter(path, _architecture(family))
        _describe_file(writer, stored, plan)
        describe(writer, config, family)
        describe_tokenizer(writer, folder, config.vocab_size)
        errors.extend(_write_tensors(writer, plan))

    write_durably(target, write)
    facts = {"tensors": ", ".join(f"{count} {name}" for name, count in Counter(t.type for t in plan).most_common())}
    if stored.quantized:
        most = max(errors)
        facts["quantized weights"] = (
            f"off by at most {most:.1e} of a linear's largest weight" if most else "equal, all of them"
        )
    return Exported(target, target.stat().st_size, facts, tuple(_notes(planner, plan)))


def _check_plain(stored: StoredWeights) -> None:
    """Raise where the weights are not all there is to the model."""
    if stored.quantization.get("quant_method") == "lrquant":
        raise UsageError(
            f"{stored.folder}: needs lrquant to run (added biases, or inputs transformed at run time), which llama.cpp "
            "does not support; quantize with --shift off and without --rotate down"
        )
    method = stored.quantization.get("quant_method")
    if method not in (None, "compressed-tensors"):
        raise UsageError(f"{stored.folder}: quantized by {method}; only compressed-tensors checkpoints can be exported")


def _architecture(family: GgufFamily) -> str:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

    return str(MODEL_ARCH_NAMES[MODEL_ARCH[family.architecture]])


@dataclass(frozen=True)
class _Planner:
    """Decides what every parameter of a checkpoint becomes."""

    stored: StoredWeights
    config: Any
    family: GgufFamily
    dtype: str  # of matrices that are not quantized

    def plan(self) -> list[_Planned]:
        """In the order of the checkpoint.

        Raises:
            UsageError: llama.cpp has no such tensor, or no block holds its integers.
        """
        from gguf import MODEL_ARCH, get_tensor_name_map

        names = get_tensor_name_map(MODEL_ARCH[self.family.architecture], self.config.num_hidden_layers)
        tied = bool(getattr(self.config, "tie_word_embeddings", False))
        plan = []
        for name in self.stored.names:
            if name.endswith(_LEFT_OUT) or (tied and name == "lm_head.weight"):
                continue
            found = names.get_name(name, try_suffixes=_SUFFIXES)
            if found is None:
                architecture = self.family.architecture
                raise UsageError(f"{self.stored.folder}: {name}: llama.cpp's {architecture} has no such tensor")
            quantized = name.endswith(".weight") and name.removesuffix(".weight") in self.stored.quantized
            plan.append(self._weight(found, name) if quantized else self._dense(found, name))
        return plan + _rope_factors(self.config)

    def _row_order(self, name: str) -> Tensor | None:
        """The checkpoint's rows in the order that llama.cpp's rotary embeddings want; None: as they are."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(name.split(".")[-2])
        if not self.family.neighbours or count is None:
            return None
        rows, half = self.stored.shape(name)[0], head_size(self.config) // 2
        return torch.arange(rows).reshape(count, 2, half).transpose(1, 2).flatten()

    def _weight(self, found: str, name: str) -> _Planned:
        stored, linear, shape = self.stored, name.removesuffix(".weight"), self.stored.shape(name)
        args, order = stored.args(linear), self._row_order(name)
        if shape[1] % BLOCK:  # no block fits: the products themselves
            return _Planned(
                found, "F32", shape, lambda: (_rows(stored.weight(linear), order).dequantized().numpy(), 0.0)
            )
        known = block_format(Numbers.of(args.model_dump(mode="json")))

        def read() -> tuple[NDArray[Any], float]:
            weight = _rows(stored.weight(linear), order)
            packed = pack(weight, args.num_bits, known)
            error = largest_error(packed, weight, known)
            _check_error(linear, error, known)
            return packed, error

        return _Planned(found, known.name, shape, read)

    def _dense(self, found: str, name: str) -> _Planned:
        from gguf import GGMLQuantizationType, quantize

        shape, order = self.stored.shape(name), self._row_order(name)
        offset = self.family.norm_offset if name.endswith("norm.weight") else 0.0
        kind = "F32" if len(shape) == 1 else self.dtype.upper()
        if kind == "Q8_0" and shape[-1] % BLOCK:
            kind = "F16"

        def read() -> tuple[NDArray[Any], float]:
            values = self.stored.tensor(name).float()
            values = (values if order is None else values[order]) + offset
            if kind == "F16" and not torch.isfinite(values.half()).all():
                raise UsageError(f"{name}: values beyond float16's range; use --dtype bf16")
            return quantize(values.numpy(), GGMLQuantizationType[kind]), 0.0

        return _Planned(found, kind, shape, read)


def _check_error(linear: str, error: float, known: BlockFormat) -> None:
    most = MOST_ERROR if known.minimum else 0.0
    if error > most:
        raise LrquantError(
            f"{linear}: {known.name} deviates from its weights by {error:.1e} of the largest, more than {most}"
        )


def _values(weight: QuantizedWeight) -> NDArray[np.float32]:
    return weight.dequantized().numpy()  # type: ignore[no-any-return]


def _rows(weight: QuantizedWeight, order: Tensor | None) -> QuantizedWeight:
    if order is None:
        return weight
    zero = None if weight.zero is None else weight.zero[order]
    return weight._replace(codes=weight.codes[order], scale=weight.scale[order], zero=zero)


def _rope_factors(config: Any) -> list[_Planned]:
    """Divisors of rotary frequencies, where they are not one number."""
    rope, _ = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        found = {"rope_freqs.weight": _llama3_factors(rope, head_size(config))}
    elif kind == "longrope":
        found = {f"rope_factors_{which}.weight": rope[f"{which}_factor"] for which in ("long", "short")}
    else:
        return []
    tensors = {name: np.asarray(values, dtype=np.float32) for name, values in found.items()}
    return [_Planned(name, "F32", tensor.shape, partial(_as_they_are, tensor)) for name, tensor in tensors.items()]


def _as_they_are(values: NDArray[Any]) -> tuple[NDArray[Any], float]:
    return values, 0.0


def _llama3_factors(rope: Any, size: int) -> NDArray[np.float32]:
    """Llama 3's divisors of the frequencies θ^(−2i/d): 1 for short waves, `factor` for long ones."""
    frequencies = rope["rope_theta"] ** (-np.arange(0, size, 2) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - share) / rope["factor"] + share)).astype(np.float32)


def _describe_file(writer: "GGUFWriter", stored: StoredWeights, plan: list[_Planned]) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    matrices = Counter(tensor.type for tensor in plan if len(tensor.shape) == 2 and tensor.name.startswith("blk."))
    main = matrices.most_common(1)[0][0]
    writer.add_type("model")
    writer.add_name(stored.folder.absolute().name)
    writer.add_quantized_by("lrquant")
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType.ALL_F32 if main == "F32" else LlamaFileType[f"MOSTLY_{main}"])


def _write_tensors(writer: "GGUFWriter", plan: list[_Planned]) -> list[float]:
    """Every tensor's bytes in the planned order; returns their errors."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for tensor in plan:
        type_ = GGMLQuantizationType[tensor.type]
        size, per_block = GGML_QUANT_SIZES[type_]
        total = math.prod(tensor.shape) // size * per_block
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), total, type_)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        errors = []
        for tensor in plan:
            values, error = tensor.read()
            writer.write_tensor_data(np.ascontiguousarray(values))
            errors.append(error)
    finally:
        writer.close()
    return errors


def _notes(planner: _Planner, plan: list[_Planned]) -> list[str]:
    """What a user should know of the file besides its size."""
    stored, config = planner.stored, planner.config
    notes = []
    groups = (stored.quantization.get("config_groups") or {}).values()
    inputs = next((group["input_activations"] for group in groups if group.get("input_activations")), None)
    if inputs:
        notes.append(
            f"The checkpoint's {inputs['num_bits']}-bit activations are not part of a GGUF file: llama.cpp rounds "
            "activations itself, to 8 bits in blocks of 32 on CPUs."
        )
    if any(name.endswith(_CACHE) for name in stored.names):
        notes.append(
            "The key-value cache's scales are not part of a GGUF file: "
            "llama-server quantizes its cache with --cache-type-k."
        )
    odd = [tensor.name for tensor in plan if tensor.type == "F32" and len(tensor.shape) == 2]
    if stored.quantized and odd:
        notes.append(f"{len(odd)} weights are float32: {BLOCK} does not divide their width.")
    context = context_length(config, planner.family)
    if context < config.max_position_embeddings:
        notes.append(
            f"The context is limited to {context} tokens: "
            f"llama.cpp has no sliding-window attention for {config.model_type}."
        )
    return notes
