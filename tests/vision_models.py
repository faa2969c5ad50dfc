"""A small random model of every vision and multimodal family, and inputs for it."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
)

WIDTH = 32
IMAGE = 9  # the token that stands for a picture
START, END = 10, 11

_VIT = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "image_size": 16, "patch_size": 4}  # fmt: skip
_TEXT = {"vocab_size": 61, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 3, "patch_size": 2}
_QWEN_TEXT = _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_QWEN_IDS = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 12}
_QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}

# name → (model_type, Auto class, configuration)
MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "vit": ("vit", AutoModelForImageClassification, _VIT | {"num_labels": 5}),
    "vit-alone": ("vit", AutoModel, _VIT),
    "vit-no-qkv-bias": ("vit", AutoModelForImageClassification, _VIT | {"qkv_bias": False}),
    "deit": ("deit", DeiTForImageClassification, _VIT | {"num_labels": 5}),
    "deit-distilled": ("deit", DeiTForImageClassificationWithTeacher, _VIT | {"num_labels": 5}),
    "clip": ("clip", AutoModelForImageClassification, {"vision_config": _VIT, "num_labels": 5}),
    "clip-alone": ("clip_vision_model", AutoModel, _VIT),
    "siglip": ("siglip", AutoModelForImageClassification, {"vision_config": _VIT, "num_labels": 5}),
    "siglip-alone": ("siglip_vision_model", AutoModel, _VIT),
    "swin": ("swin", AutoModelForImageClassification, _SWIN | {"image_size": 24, "num_labels": 5}),
    "swin-padded": ("swin", AutoModelForImageClassification, _SWIN | {"image_size": 20, "num_labels": 5}),
    "swin-alone": ("swin", AutoModel, _SWIN | {"image_size": 24}),
    "llava": (
        "llava", AutoModelForImageTextToText,
        {"vision_config": _VIT | {"model_type": "clip_vision_model"}, "text_config": _TEXT | {"model_type": "llama"},
         "image_token_index": IMAGE, "vision_feature_layer": -1},
    ),
    "llava-second-last-layer": (
        "llava", AutoModelForImageTextToText,
        {"vision_config": _VIT | {"model_type": "siglip_vision_model"}, "text_config": _TEXT | {"model_type": "qwen2"},
         "image_token_index": IMAGE, "vision_feature_layer": -2, "vision_feature_select_strategy": "full"},
    ),
    "qwen2-vl": (
        "qwen2_vl", AutoModelForImageTextToText,
        _QWEN_IDS | {"text_config": _QWEN_TEXT,
                     "vision_config": _QWEN_VISION | {"embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}},
    ),
    "qwen2.5-vl": (
        "qwen2_5_vl", AutoModelForImageTextToText,
        _QWEN_IDS | {"text_config": _QWEN_TEXT,
                     "vision_config": _QWEN_VISION | {"hidden_size": WIDTH, "intermediate_size": 48, "window_size": 16,
                                                      "out_hidden_size": WIDTH, "fullatt_block_indexes": [1]}},
    ),
    "gemma3": (
        "gemma3", AutoModelForImageTextToText,
        {"vision_config": _VIT | {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 16,
         "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END,
         "text_config": _TEXT | {"head_dim": 8, "sliding_window": 8,
                                 "layer_types": ["sliding_attention", "full_attention"]}},
    ),
    "smolvlm": (
        "smolvlm", AutoModelForImageTextToText,
        {"vision_config": _VIT, "text_config": _TEXT | {"model_type": "llama"}, "scale_factor": 2,
         "image_token_id": IMAGE},
    ),
}  # fmt: skip
MULTIMODAL = tuple(name for name, (_, auto, _) in MODELS.items() if auto is AutoModelForImageTextToText)


@torch.no_grad()
def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A fresh model, the same on every call. Norms, biases and position tables are random, so losing one shows."""
    model_type, auto, changes = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **changes)
    model = auto.from_config(config, dtype=dtype) if hasattr(auto, "from_config") else auto(config).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
        else:
            parameter.normal_(std=WIDTH**-0.5)
    return model.eval()


def inputs_of(name: str, samples: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """Keyword arguments of single-sample calls."""
    generator = torch.Generator().manual_seed(seed)
    return [_input(name, generator, dtype) for _ in range(samples)]


def _input(name: str, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    _, _, config = MODELS[name]
    if name not in MULTIMODAL:
        size = config.get("image_size") or config["vision_config"]["image_size"]
        return {"pixel_values": torch.randn(1, 3, size, size, generator=generator, dtype=dtype)}
    words = torch.randint(13, 61, (1, 7), generator=generator)
    if name.startswith("qwen"):  # 4 × 8 patches, merged two by two
        grid = torch.tensor([[1, 4, 8]])
        ids = _with_picture(words, [START, *[IMAGE] * 8, END])
        pixels = torch.randn(32, 3 * 2 * 4 * 4, generator=generator, dtype=dtype)
        types = (ids == IMAGE).int()
        return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": types,
                "use_cache": False}  # fmt: skip
    pixels = torch.randn(1, 3, 16, 16, generator=generator, dtype=dtype)
    if name == "smolvlm":
        pixels = pixels[None]
    ids = _with_picture(words, [IMAGE] * (4 if name == "smolvlm" else 16))
    values: dict[str, Any] = {"input_ids": ids, "pixel_values": pixels, "use_cache": False}
    return values | {"token_type_ids": (ids == IMAGE).int()} if name == "gemma3" else values


def _with_picture(words: Tensor, picture: list[int]) -> Tensor:
    return torch.cat([words[:, :2], torch.tensor([picture]), words[:, 2:]], dim=1)


def output_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Logits, or the last hidden states of a bare tower."""
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state
