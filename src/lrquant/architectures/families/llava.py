"""LLaVA: any known vision tower, a projector, any known language model."""

from lrquant.architectures.family import MultimodalFamily, Tower

FAMILY = MultimodalFamily(
    "llava",
    ("llava",),
    (
        Tower("vision", "model.vision_tower", "vision_config"),
        Tower("language", "model.language_model", "text_config"),
    ),
    projector="model.multi_modal_projector.linear_2",
)
