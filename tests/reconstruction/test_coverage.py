"""The share of a model that is quantized: counted in parameters, with a reason for everything that is left."""

from typing import Any

import pytest
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lrquant import UsageError
from lrquant.reconstruction.coverage import CONV1D, EXPERTS, IGNORED, Coverage, coverage_of

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
GATED = 4 * 64 * 64 + 3 * 64 * 128  # parameters in linears of a block
EXPERT = {"num_local_experts": 4, "num_experts_per_tok": 2}
MOE: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip


def skeleton(model_type: str, **changes: Any) -> Any:
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL | changes))


def covered(model: Any, blocks: str = "model.layers", **given: Any) -> Coverage:
    """The coverage where every `nn.Linear` of every block is quantized."""
    paths = [f"{blocks}.{index}" for index in range(len(model.get_submodule(blocks)))]
    linears = {
        f"{name}.weight"
        for path in paths
        for name, module in model.get_submodule(path).named_modules(prefix=path)
        if isinstance(module, nn.Linear)
    }
    return coverage_of(model, paths, linears, **given)


def test_a_dense_decoder_keeps_embedding_head_and_norms() -> None:
    found = covered(skeleton("llama"))
    counts = {left.reason: left.parameters for left in found.left if not left.in_blocks}
    assert counts == {"embedding": 96 * 64, "output head": 96 * 64, "norm": 64}
    assert found.quantized == 2 * GATED
    assert found.parameters == 2 * (GATED + 2 * 64) + 2 * 96 * 64 + 64
    assert found.block_share == pytest.approx(GATED / (GATED + 128))
    assert (found.missed, found.warning()) == ((), None)
    found.check()


def test_tied_embeddings_count_once() -> None:
    assert covered(skeleton("llama", tie_word_embeddings=True)).parameters == 2 * (GATED + 2 * 64) + 96 * 64 + 64


def test_experts_that_are_not_understood_are_refused_by_name() -> None:
    found = covered(skeleton("mixtral", **EXPERT))
    experts = 2 * 4 * 3 * 64 * 128
    assert [(left.reason, left.parameters) for left in found.missed] == [(EXPERTS, experts)]
    assert "router or gate" in {left.reason for left in found.left}
    with pytest.raises(UsageError, match=r"only 1\d\.\d% of the blocks' parameters.*model\.layers\.\*\.mlp\.experts"):
        found.check()


def test_experts_that_are_quantized_count_and_kinds_are_told_apart() -> None:
    model = skeleton("deepseek_v3", **MOE)
    plain = covered(model)
    assert [kind.blocks for kind in plain.kinds] == [(0,), (1,)]
    assert plain.kinds[0].share > 0.99 > plain.kinds[1].share
    assert "of the blocks' parameters stay in floating point: model.layers.*.mlp.experts" in str(plain.warning())
    plain.check()  # less than half
    experts = {name for name, tensor in model.named_parameters() if tensor.ndim == 3}
    paths = ["model.layers.0", "model.layers.1"]
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    whole = coverage_of(model, paths, linears | experts)
    assert whole.block_share > 0.95
    assert whole.warning() is None


def test_what_the_user_left_out_is_no_surprise() -> None:
    model = skeleton("mixtral", **EXPERT)
    found = covered(model, ignored=lambda module: "experts" in module)
    assert found.missed == ()
    assert any(left.reason == IGNORED for left in found.left)
    found.check()


def test_matrices_of_another_class_are_noticed() -> None:
    model = skeleton("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64)
    found = covered(model, "transformer.h")
    assert {left.reason for left in found.missed} == {CONV1D}
    with pytest.raises(UsageError, match=r"only 0\.0%"):
        found.check()


def test_state_spaces_convolutions_and_vectors_are_left_by_design() -> None:
    model = skeleton("mamba2", num_heads=8, head_dim=16, state_size=8, n_groups=1, expand=2)
    found = covered(model, "backbone.layers")
    assert found.missed == ()
    assert {"convolution", "vector", "norm"} <= {left.reason for left in found.left}


def test_people_and_programs_get_the_same_numbers() -> None:
    found = covered(skeleton("llama"))
    assert found.summary().startswith(f"{found.share:.1%} of the model's ")
    assert sum(left["parameters"] for left in found.as_dict()["left"]) == found.parameters - found.quantized
    assert [row[0] for row in found.rows()] == ["embedding", "output head", "norm"]
