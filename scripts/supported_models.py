"""Write docs/supported-models.md: `python scripts/supported_models.py`. A test compares some of its rows.

Each row is what lrquant finds in a small model of that type, built without weights. Types with a family file are
analysed like any other, so the table shows what discovery finds by itself.
"""

import warnings
from pathlib import Path
from typing import Any

from lrquant.architectures import family_names, family_of
from lrquant.architectures.discovery import blocks_in
from lrquant.architectures.targets import expose_linears
from lrquant.transforms import Equivalence, NormToLinears, QueryKey, UpToDown, ValueToOutput

TARGET = Path(__file__).parents[1] / "docs" / "supported-models.md"

COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {key: value for key, value in COMMON.items() if key not in ("num_key_value_heads", "pad_token_id")}
ENCODER |= {"pad_token_id": 0}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
          "image_size": 16, "patch_size": 4}  # fmt: skip
QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
               "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}, "head_dim": 8}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
          "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
          "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64}

# heading → model type → what differs from COMMON
TYPES: dict[str, dict[str, dict[str, Any]]] = {
    "Language models": {
        "apertus": {}, "arcee": {}, "bloom": {"n_layer": 2, "n_head": 4}, "codegen": GPT | {"rotary_dim": 4},
        "cohere": {}, "cohere2": {}, "ernie4_5": {}, "exaone4": {}, "falcon": {}, "gemma": {"head_dim": 8},
        "gemma2": {"head_dim": 8}, "gemma3_text": {"head_dim": 8}, "glm": {"head_dim": 8}, "glm4": {"head_dim": 8},
        "gpt2": GPT, "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}, "gpt_neox": {},
        "gptj": GPT | {"rotary_dim": 4}, "granite": {}, "helium": {"head_dim": 8}, "hunyuan_v1_dense": {"head_dim": 8},
        "llama": {}, "mistral": {}, "modernbert-decoder": {},
        "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, "nemotron": {}, "olmo": {},
        "olmo2": {}, "olmo3": {}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "persimmon": {}, "phi": {},
        "phi3": {}, "qwen2": {}, "qwen3": {"head_dim": 8}, "seed_oss": {"head_dim": 8}, "smollm3": {},
        "stablelm": {}, "starcoder2": {}, "vaultgemma": {"head_dim": 8},
    },
    "Hybrids": {
        "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 16,
                  "mamba_n_groups": 1},
        "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8,
                      "mamba_n_groups": 1, "head_dim": 8},
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2},
        "qwen3_5_text": {"head_dim": 8, "num_hidden_layers": 4} | LINEAR,
        "qwen3_next": {"num_hidden_layers": 4, "head_dim": 8, "shared_expert_intermediate_size": 16} | LINEAR | EXPERTS,
    },
    "Mixtures of experts": {
        "deepseek_v3": LATENT, "glm4_moe": {"head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 16,
                                            "num_experts_per_tok": 2, "first_k_dense_replace": 1},
        "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "llama4_text": {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48, "num_hidden_layers": 4,
                        "interleave_moe_layer_step": 2},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}, "olmoe": EXPERTS,
        "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16}, "qwen3_moe": EXPERTS | {"head_dim": 8},
    },
    "Encoders": {
        "albert": {}, "bert": {}, "camembert": {}, "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4,
                                                                  "hidden_dim": 48},
        "electra": {"embedding_size": 32}, "modernbert": {"cls_token_id": 1, "sep_token_id": 2}, "roberta": {},
        "xlm-roberta": {},
    },
    "Multimodal": {
        "aya_vision": {"text_config": COMMON | {"model_type": "cohere2"},
                       "vision_config": VISION | {"model_type": "siglip_vision_model"}},
        "glm4v": {"text_config": COMMON | MROPE, "vision_config": QWEN_VISION | {"image_size": 16}},
        "idefics2": {"text_config": COMMON | {"model_type": "mistral"}, "vision_config": VISION},
        "internvl": {"text_config": COMMON | {"model_type": "qwen2"},
                     "vision_config": VISION | {"image_size": [16, 16], "patch_size": [4, 4]}},
        "lfm2_vl": {"text_config": COMMON | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
                    "vision_config": {"model_type": "siglip2_vision_model", "hidden_size": 32, "num_patches": 16,
                                      "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                                      "patch_size": 4}},
        "llama4": {"text_config": COMMON | {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48},
                   "vision_config": VISION | {"vision_output_dim": 32, "projector_input_dim": 32,
                                              "projector_output_dim": 32}},
        "llava_next": {"text_config": COMMON | {"model_type": "llama"}, "image_grid_pinpoints": [[16, 16]],
                       "vision_config": VISION | {"model_type": "clip_vision_model"}},
        "llava_onevision": {"text_config": COMMON | {"model_type": "qwen2"}, "image_grid_pinpoints": [[16, 16]],
                            "vision_config": VISION | {"model_type": "siglip_vision_model"}},
        "mistral3": {"text_config": COMMON | {"model_type": "mistral"},
                     "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8}},
        "paligemma": {"text_config": COMMON | {"model_type": "gemma", "head_dim": 8}, "projection_dim": 32,
                      "vision_config": VISION | {"model_type": "siglip_vision_model", "projection_dim": 32}},
        "qwen3_5": {"text_config": COMMON | {"head_dim": 8, "num_hidden_layers": 4} | LINEAR,
                    "vision_config": QWEN_VISION | {"num_position_embeddings": 16}},
        "qwen3_vl": {"text_config": COMMON | MROPE,
                     "vision_config": QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
    },
}  # fmt: skip
AUTO = {"Encoders": "AutoModelForMaskedLM", "Multimodal": "AutoModelForImageTextToText"}

PAGE = """# Supported models

This table shows the transformations that `lrquant` finds in a small model of each type (transformers {version}). It
discovers them from the model's structure and tests each one: a transformation is used only if the block's output
stays equal in float64. Types that are not listed are analysed in the same way. A type marked • has a family file
([adding a model](adding-a-model.md)).

| column | meaning |
|---|---|
| norms | the number of norms whose channels can be scaled together with the linears behind them |
| value | values → output projection |
| q·k | queries and keys |
| up | up → down projection, or the corresponding pair |

If a model has several kinds of blocks, as hybrids do, "+" separates them. "–" means that no exact rescaling exists. A
norm behind a sublayer, a norm without weights, and a norm whose output is also the residual are not scaled. For
multimodal models, the table shows the language tower.
"""


def built(heading: str, model_type: str) -> Any:
    """A model of the type, without weights."""
    import transformers
    from accelerate import init_empty_weights

    common = {} if heading == "Multimodal" else COMMON
    config = transformers.AutoConfig.for_model(model_type, **(common | TYPES[heading][model_type]))
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, AUTO.get(heading, "AutoModelForCausalLM")).from_config(config).eval()
    expose_linears(model)
    return model


def row(heading: str, model_type: str) -> str:
    """The page's row for one type; of a multimodal model, that of its language tower."""
    model = built(heading, model_type)
    family = family_of(model)
    roots = {part.name: part.path for part in getattr(family, "parts", ())}
    found = blocks_in(model, roots.get("language", ""), sees=False).found()
    kinds = list({tuple(e.name for e in own): own for own in found.equivalences}.values())
    cell = (" + ".join(each) for each in zip(*map(cells, kinds), strict=True))
    return f"| {model_type}{' •' if model_type in family_names() else ''} | {' | '.join(cell)} |"


def cells(own: tuple[Equivalence, ...]) -> list[str]:
    """What one kind of block has in each column."""
    norms = sum(isinstance(each, NormToLinears) for each in own)
    kinds = (ValueToOutput, QueryKey, UpToDown)
    return [str(norms or "–"), *("yes" if any(isinstance(e, kind) for e in own) else "–" for kind in kinds)]


def page() -> str:
    import transformers

    text = [PAGE.format(version=".".join(transformers.__version__.split(".")[:2]))]
    for heading, types in TYPES.items():
        text.append(f"## {heading}\n\n| model type | norms | value | q·k | up |\n|---|---|---|---|---|")
        text.extend(row(heading, model_type) for model_type in types)
        text.append("")
    return "\n".join(text)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    TARGET.write_text(page())
