"""Qwen2.5-VL: Qwen2-VL with RMSNorm, a gated MLP and attention windows in the vision tower."""

from typing import Any

from lrquant.architectures.families.qwen2_vl import TEXT, attention
from lrquant.architectures.family import Family, MultimodalFamily, Tower
from lrquant.transforms import Equivalence, NormToLinears, UpToDown


def vision(config: Any) -> tuple[Equivalence, ...]:
    return (
        *attention(config, config.hidden_size),
        NormToLinears("norm2", ("mlp.gate_proj", "mlp.up_proj")),
        UpToDown("mlp.up_proj", "mlp.down_proj"),
    )


VISION = Family("qwen2_5_vl_vision", ("qwen2_5_vl_vision",), "visual.blocks", vision, tower="vision")
PARTS = (Tower("vision", "model.visual", "vision_config", VISION), TEXT)

FAMILY = MultimodalFamily("qwen2_5_vl", ("qwen2_5_vl",), PARTS, "model.visual.merger.mlp.2")
