"""Transformations found by structure: what family files declare is found again, and what does not hold is refused."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM

from lrquant.architectures import FoundFamily, family_of
from lrquant.architectures.candidates import candidates
from lrquant.architectures.discovery import Blocks, discover
from lrquant.architectures.family import found_notes
from lrquant.architectures.layouts import unpaired
from lrquant.architectures.probe import Probe, calls_of, text_inputs
from lrquant.architectures.proof import proven
from lrquant.errors import UsageError
from lrquant.transforms import Equivalence, NormToLinears, QueryKey, ValueToOutput
from lrquant.transforms.equivalence import Edits
from lrquant.transforms.statistics import ChannelStatistics
from tests.models import MODELS, build

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
          "image_size": 16, "patch_size": 4}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}, "head_dim": 8}


def small(model_type: str, auto: Any = AutoModelForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(model_type, **SMALL | changes)).eval()


def names_of(model: Any, index: int = 0) -> set[str]:
    (stage,) = family_of(model).stages(model)
    return {equivalence.name for equivalence in stage.equivalences_of(index)}


def edits_of(model: Any, equivalence: Equivalence) -> tuple[Edits, Tensor]:
    """What `equivalence` asks of a block for a fixed random scale (and shift)."""
    block = model.get_submodule(family_of(model).blocks)[0]
    params = dict(block.named_parameters())
    ones = {
        name: ChannelStatistics(torch.ones(module.in_features), torch.zeros(module.in_features))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    start = equivalence.initial(params, ones, "neutral", 0.5)["scale"]
    scale = 0.5 + torch.rand(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    edits = Edits()
    equivalence.record(params, scale, scale - 1 if equivalence.bias_slots else None, edits)
    return edits, scale


# --- What files declare is found ---


@pytest.mark.parametrize("name", MODELS)
def test_what_a_family_file_declares_is_found(name: str) -> None:
    model = build(name)
    path = family_of(model).blocks
    declared = family_of(model).equivalences(model.config)
    found = {each.name: each for each in Blocks(model, path, "", sees=False).equivalences(0)}
    assert found.keys() == {each.name for each in declared}
    for each in declared:
        expected, scale = edits_of(model, each)
        seen, same_scale = edits_of(model, found[each.name])
        assert torch.equal(scale, same_scale)
        for part in ("row", "column", "input_shift", "output_shift"):
            torch.testing.assert_close(getattr(seen, part), getattr(expected, part))
        assert {norm: edit[2] for norm, edit in seen.norm.items()} == {n: edit[2] for n, edit in expected.norm.items()}


# --- Families without a file ---


@pytest.mark.parametrize("model_type", ["granite", "smollm3", "starcoder2", "stablelm", "glm", "seed_oss", "phi"])
def test_a_decoder_without_a_file_is_smoothed_at_every_norm(model_type: str) -> None:
    model = small(model_type)
    names = names_of(model)
    assert {"value->output", "query*key"} <= names
    (stage,) = family_of(model).stages(model)
    read = {linear for each in stage.equivalences_of(0) if isinstance(each, NormToLinears) for linear in each.linears}
    assert read >= {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    assert any(linear.startswith("mlp.") for linear in read)


def test_norms_behind_sublayers_and_norms_without_weights_are_left_alone() -> None:
    assert names_of(small("olmo2")) == {"value->output", "query*key", "up->down"}
    assert names_of(small("olmo")) == {"value->output", "query*key", "up->down"}


def test_one_norm_before_attention_and_mlp_is_found_with_all_its_readers() -> None:
    model = small("cohere")
    (stage,) = family_of(model).stages(model)
    (norm,) = (each for each in stage.equivalences_of(0) if isinstance(each, NormToLinears))
    assert set(norm.linears) == {*(f"self_attn.{x}_proj" for x in "qkv"), "mlp.gate_proj", "mlp.up_proj"}


def test_scores_written_out_are_followed_like_those_of_sdpa() -> None:
    assert names_of(small("bloom", n_layer=2, n_head=4)) >= {"value->output", "query*key"}
    assert names_of(small("gptj", n_embd=32, n_layer=2, n_head=4, n_inner=48, rotary_dim=4)) >= {
        "ln_1->linears", "value->output", "query*key"
    }  # fmt: skip


def test_blocks_of_several_kinds_each_have_their_own() -> None:
    model = small("bamba", attn_layer_indices=[1], mamba_n_heads=4, mamba_d_state=8, mamba_d_head=16, mamba_n_groups=1)
    mamba, attention = names_of(model, 0), names_of(model, 1)
    assert "mamba.norm->linears" in mamba
    assert "value->output" not in mamba
    assert "value->output" in attention


def test_latent_attention_scales_the_channels_without_positions() -> None:
    model = small(
        "deepseek_v3", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, first_k_dense_replace=2,
    )  # fmt: skip
    (stage,) = family_of(model).stages(model)
    (pair,) = (each for each in stage.equivalences_of(0) if isinstance(each, QueryKey))
    assert (pair.query, pair.key, len(pair.pair)) == ("self_attn.q_b_proj", "self_attn.kv_b_proj", 8)


def test_attention_sinks_take_a_scale_and_no_shift() -> None:
    model = small("gpt_oss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    (stage,) = family_of(model).stages(model)
    (value,) = (each for each in stage.equivalences_of(0) if isinstance(each, ValueToOutput))
    assert value.bias_slots == ()  # the weights of the values sum to less than one


def test_queries_and_keys_normed_over_all_heads_are_scaled_there() -> None:
    model = small("olmo2")
    (stage,) = family_of(model).stages(model)
    (pair,) = (each for each in stage.equivalences_of(0) if isinstance(each, QueryKey))
    assert (pair.query_norm, pair.key_norm) == ("self_attn.q_norm", "self_attn.k_norm")
    assert pair.key_rows.max() == 15  # two heads of eight: the norm's own elements


def test_an_encoder_with_norms_in_the_residual_keeps_them() -> None:
    model = small("bert", AutoModelForMaskedLM)
    assert names_of(model) == {"value->output", "query*key"}


# --- Proof ---


def probe_of(model: Any, path: str = "model.layers") -> Probe:
    return Probe(model.get_submodule(path)[0], calls_of(model, path, text_inputs(model, 9)[0])[0])


def held(probe: Probe, *candidates: Equivalence) -> Sequence[Equivalence]:
    return proven(probe, [[each] for each in candidates])


def test_wrong_candidates_are_refused() -> None:
    probe = probe_of(build("gemma2"))
    right = {each.name: each for group in candidates(probe.trace()) for each in proven(probe, [group])}
    assert held(probe, *right.values()) == tuple(right.values())
    value, pair, norm = (right[n] for n in ("value->output", "query*key", "input_layernorm->linears"))
    assert isinstance(value, ValueToOutput)
    assert isinstance(pair, QueryKey)
    assert isinstance(norm, NormToLinears)
    assert norm.offset == 1.0
    assert held(probe, dataclasses.replace(norm, offset=0.0)) == ()
    assert held(probe, dataclasses.replace(norm, linears=norm.linears[:2])) == ()
    assert held(probe, dataclasses.replace(value, output_columns=value.output_columns.flip(0))) == ()
    assert held(probe, dataclasses.replace(pair, pair=unpaired(len(pair.pair)))) == ()
    assert held(probe, NormToLinears("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), 1.0)) == ()


def test_what_never_reaches_the_output_proves_nothing() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.used, self.idle = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden: Tensor) -> Tensor:
            given = self.norm(hidden)
            return hidden + self.used(given) + 0 * self.idle(given)

    block = Block().eval()
    from lrquant.architectures.probe import Call

    probe = Probe(block, Call(torch.randn(1, 5, 8, dtype=torch.float64), {}))
    assert held(probe, NormToLinears("norm", ("used", "idle"))) == ()
    assert held(probe, NormToLinears("norm", ("used",))) != ()


def test_a_block_is_left_as_it_was() -> None:
    model = build("llama")
    (call, *_) = calls_of(model, "model.layers", text_inputs(model, 9)[0])
    block = model.model.layers[0].train()
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    assert len(discover(block, call)) == 5
    assert block.training
    assert "forward" not in vars(block)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in block.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())
    assert torch.get_default_dtype() is torch.float32


def test_a_skeleton_without_weights_is_enough() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("granite", **SMALL)).eval()
    assert "value->output" in names_of(model)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_block_whose_code_fails_is_named_and_keeps_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("granite")
    mlp = type(model.model.layers[0].mlp)

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no kernel for float64\nand more")

    monkeypatch.setattr(mlp, "forward", broken)
    family = family_of(model)
    assert isinstance(family, FoundFamily)
    assert names_of(model) == set()
    assert found_notes("granite", family.stages(model))[1] == (
        "GraniteDecoderLayer in model.layers could not be analysed (no kernel for float64): its weights are clipped, "
        "not smoothed."
    )


# --- Towers ---

QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
               "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}  # fmt: skip
MULTIMODAL: dict[str, tuple[dict[str, Any], str, str]] = {
    "qwen3_vl": (
        {"text_config": SMALL | MROPE,
         "vision_config": QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
        "model.visual.blocks", "model.language_model.layers",
    ),
    "mistral3": (
        {"text_config": SMALL | {"model_type": "mistral"},
         "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8}},
        "model.vision_tower.transformer.layers", "model.language_model.layers",
    ),
    "internvl": (
        {"text_config": SMALL | {"model_type": "qwen2"},
         "vision_config": VISION | {"image_size": [16, 16], "patch_size": [4, 4]}},
        "model.vision_tower.encoder.layer", "model.language_model.layers",
    ),
    "glm4v": (
        {"text_config": SMALL | MROPE, "vision_config": QWEN_VISION | {"image_size": 16}},
        "model.visual.blocks", "model.language_model.layers",
    ),
    "llava": (
        {"text_config": SMALL | {"model_type": "phi"}, "image_token_index": 9,
         "vision_config": VISION | {"model_type": "clip_vision_model"}},
        "model.vision_tower.encoder.layers", "model.language_model.layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_towers_are_found_and_both_are_smoothed(model_type: str) -> None:
    settings, vision, language = MULTIMODAL[model_type]
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    family = family_of(model)
    assert family.towers == ("vision", "language")
    assert [stage.path for stage in family.stages(model)] == [language]
    stages = family.stages(model, ("language", "vision"))
    assert [stage.path for stage in stages] == [vision, language]
    for stage in stages:
        assert "value->output" in {each.name for each in stage.equivalences_of(0)}


def test_an_encoder_with_a_decoder_behind_it_is_refused() -> None:
    from transformers import AutoModel

    model = AutoModel.from_config(
        AutoConfig.for_model("t5", vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )
    with pytest.raises(UsageError, match=r"^model type 't5' is not supported: it has an encoder"):
        family_of(model)
