"""Model families in llama.cpp: names, metadata, and tensors that differ from transformers'.

A family is a row of `FAMILIES`. llama.cpp's NORM type of rotary embeddings rotates adjacent channels, while
transformers rotates channel i with i + d/2, so the rows of queries and keys are reordered. Gemma's norms multiply by 1
+ w in transformers and by w in llama.cpp.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrquant.errors import UsageError

if TYPE_CHECKING:
    from gguf import GGUFWriter

MOST_EXACT = "llama.cpp computes something different"


@dataclass(frozen=True)
class GgufFamily:
    """One model family in llama.cpp."""

    architecture: str  # gguf.MODEL_ARCH's
    neighbours: bool = False  # whether rotary embeddings turn neighbouring channels
    norm_offset: float = 0.0  # what is added to norms' weights
    activation: tuple[str, ...] = ("silu",)  # as transformers calls it
    windows: bool = False  # whether sliding windows are applied; else the context ends where they begin
    describe: Callable[["GGUFWriter", Any], None] = lambda writer, config: None  # what only this family has


def family_of(config: Any) -> GgufFamily:
    """The row of a model's configuration.

    Raises:
        UsageError: llama.cpp, or this table, does not have the family, or not in this form.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UsageError(f"{config.model_type}: GGUF export does not support it; it supports {', '.join(FAMILIES)}")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in family.activation:
        raise UsageError(f"activation {activation} of a {config.model_type} model: {MOST_EXACT}")
    return family


def head_size(config: Any) -> int:
    """Channels of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def context_length(config: Any, family: GgufFamily) -> int:
    """Tokens up to which llama.cpp computes what transformers does."""
    most = int(config.max_position_embeddings)
    kinds = getattr(config, "layer_types", None) or ()
    slides = "sliding_attention" in kinds if kinds else bool(getattr(config, "sliding_window", None))
    return min(most, int(config.sliding_window)) if slides and not family.windows else most


def describe(writer: "GGUFWriter", config: Any, family: GgufFamily) -> None:
    """The numbers that llama.cpp builds the model by."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config, family))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _describe_rope(writer, config)
    family.describe(writer, config)


def rope_of(config: Any) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Rotary embeddings' parameters: of every layer or the global ones, and of the sliding ones where they differ."""
    parameters = config.rope_parameters
    return parameters.get("full_attention", parameters), parameters.get("sliding_attention")


def _describe_rope(writer: "GGUFWriter", config: Any) -> None:
    from gguf import RopeScalingType

    rope, sliding = rope_of(config)
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(int(head_size(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if sliding is not None:
        if sliding.get("rope_type", "default") != "default":
            raise UsageError(f"rotary embeddings of type {sliding['rope_type']} in sliding layers: {MOST_EXACT}")
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        _describe_yarn(writer, rope)
    elif kind == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
    elif kind not in ("default", "linear", "llama3"):
        raise UsageError(f"rotary embeddings of type {kind}: {MOST_EXACT}")


def _describe_yarn(writer: "GGUFWriter", rope: Mapping[str, Any]) -> None:
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
    other = sorted(name for name in rope if name not in known and rope[name] is not None)
    if other:
        raise UsageError(f"YaRN with {', '.join(other)}: {MOST_EXACT}")
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
    writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def _describe_gemma2(writer: "GGUFWriter", config: Any) -> None:
    _check_gemma(config, every=2)
    if config.attn_logit_softcapping is None or config.final_logit_softcapping is None:
        raise UsageError(f"a Gemma 2 model without soft-capping: {MOST_EXACT}")
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _describe_gemma3(writer: "GGUFWriter", config: Any) -> None:
    _check_gemma(config, every=6)
    if config.attn_logit_softcapping is not None:
        raise UsageError(f"a Gemma 3 model with attention soft-capping: {MOST_EXACT}")
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _check_gemma(config: Any, every: int) -> None:
    """llama.cpp knows Gemma's pattern of windows and the scale of its attention; they are in no metadata."""
    expected = [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(len(config.layer_types))
    ]
    if list(config.layer_types) != expected:
        raise UsageError(f"full attention elsewhere than in every {every}th layer: {MOST_EXACT}")
    largest = config.num_hidden_layers == (46 if every == 2 else 62)  # the 27B models scale by their width
    scale = config.hidden_size // config.num_attention_heads if largest else head_size(config)
    if config.query_pre_attn_scalar != scale:
        raise UsageError(f"query_pre_attn_scalar = {config.query_pre_attn_scalar}, not {scale}: {MOST_EXACT}")


def _describe_phi3(writer: "GGUFWriter", config: Any) -> None:
    rope, _ = rope_of(config)
    original = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", config.max_position_embeddings
    )
    writer.add_rope_scaling_orig_ctx_len(original)
    if rope.get("rope_type") == "longrope":
        factor = rope.get("factor") or config.max_position_embeddings / original
        plain = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or plain)
    writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)


_GELU = ("gelu_pytorch_tanh",)

FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("LLAMA", neighbours=True),
    "mistral": GgufFamily("LLAMA", neighbours=True),
    "qwen2": GgufFamily("QWEN2"),
    "qwen3": GgufFamily("QWEN3"),
    "gemma2": GgufFamily("GEMMA2", norm_offset=1.0, activation=_GELU, windows=True, describe=_describe_gemma2),
    "gemma3_text": GgufFamily("GEMMA3", norm_offset=1.0, activation=_GELU, windows=True, describe=_describe_gemma3),
    "phi3": GgufFamily("PHI3", describe=_describe_phi3),
}
