"""Qwen2-VL: a vision tower with rotary positions and one projection for q, k, v, before Qwen2's language model.

Multimodal rotary embedding still turns channels j and j + half together, so scales are shared as in Qwen2.
"""

from typing import Any

from lrquant.architectures.family import Family, MultimodalFamily, Tower
from lrquant.architectures.gated_decoder import RESIDUAL, gated_decoder
from lrquant.architectures.layouts import rope_pairs, stacked
from lrquant.transforms import Equivalence, NormToLinears, QueryKey, ValueToOutput


def attention(config: Any, width: int) -> tuple[Equivalence, ...]:
    """Transformations of the vision tower's attention, which Qwen2.5-VL shares."""
    heads = stacked(config.num_heads, 1, width // config.num_heads)
    return (
        NormToLinears("norm1", ("attn.qkv",)),
        ValueToOutput("attn.qkv", "attn.proj", heads.value, heads.output),
        QueryKey("attn.qkv", "attn.qkv", heads.query, heads.key, rope_pairs(width // config.num_heads)),
    )


def vision(config: Any) -> tuple[Equivalence, ...]:
    return (*attention(config, config.embed_dim), NormToLinears("norm2", ("mlp.fc1",)))


VISION = Family("qwen2_vl_vision", ("qwen2_vl_vision",), "visual.blocks", vision, tower="vision")
LANGUAGE = Family(
    "qwen2_vl_text", ("qwen2_vl_text", "qwen2_5_vl_text"), "model.layers", gated_decoder, residual=RESIDUAL
)
TEXT = Tower("language", "model.language_model", "text_config", LANGUAGE)
PARTS = (Tower("vision", "model.visual", "vision_config", VISION), TEXT)

FAMILY = MultimodalFamily("qwen2_vl", ("qwen2_vl",), PARTS, "model.visual.merger.mlp.2")
