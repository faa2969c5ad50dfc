"""SmolVLM and Idefics3: a SigLIP-like tower, a connector that folds patches together, Llama."""

from lrquant.architectures.families.clip import equivalences
from lrquant.architectures.family import Family, MultimodalFamily, Tower

VISION = Family(
    "smolvlm_vision",
    ("smolvlm_vision", "idefics3_vision"),
    "vision_model.encoder.layers",
    equivalences,
    tower="vision",
)

FAMILY = MultimodalFamily(
    "smolvlm",
    ("smolvlm", "idefics3"),
    (
        Tower("vision", "model.vision_model", "vision_config", VISION),
        Tower("language", "model.text_model", "text_config"),
    ),
    projector="model.connector.modality_projection.proj",
)
