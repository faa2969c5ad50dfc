"""Rotations leave every family's function as it is, and what they cannot be folded into is named.

In float64 throughout, as in tests/architectures: exactness means agreement to rounding.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from lrquant import Recipe
from lrquant.architectures import family_of
from lrquant.errors import UsageError
from lrquant.loading.original import Original
from lrquant.passes.rotation import resolve_rotation, rotate
from lrquant.reconstruction.block_parameters import freeze
from lrquant.reconstruction.compiled_block import CompiledBlocks
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables import Start
from lrquant.reconstruction.learnables.clipping import Clipping
from lrquant.reconstruction.result import Rotated
from lrquant.transforms.hadamard import hadamard, keeping_mean, orthogonal_matrix
from lrquant.transforms.online import BlockHadamard, add_online_transform
from tests import models, vision_models
from tests.models import InDouble
from tests.reconstruction.test_compiled_block import Line, needs_compiling

EXACT = 1e-10  # relative to the largest logit
IDS = models.token_ids(2)
# Where the stream cannot be rotated, and the reason's words.
NO_STREAM = {
    "gemma2": "norm follows each sublayer",
    "gemma3": "norm follows each sublayer",
    "opt-norm-after": "neither reads",
    "opt-bare-norms": "neither reads",
}


def rotated(model: Any, *parts: str, kind: str = "hadamard", seed: int = 0) -> Rotated:
    recipe = Recipe.preset("lrquant", rotate=parts, rotate_by=kind, seed=seed)
    return rotate(original(model), recipe)


def original(model: Any) -> Original:
    """`model` with all its towers, to be stored in its own precision."""
    return Original.in_memory(model, Recipe.preset("lrquant", towers=family_of(model).towers))


def resolved(model: Any, *parts: str) -> tuple[str, ...]:
    """What the parts come to on `model`."""
    recipe = Recipe.preset("lrquant", rotate=parts)
    return recipe.changed(**resolve_rotation(original(model), recipe)).rotate


def tied(model: Any) -> bool:
    return bool(getattr(model, "all_tied_weights_keys", None))


def deviation(model: Any, expected: Tensor) -> float:
    return float((models.logits(model, IDS) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("name", [name for name in models.MODELS if name not in NO_STREAM])
def test_everything_rotated_is_exact(name: str, kind: str) -> None:
    model = models.build(name)
    before, weights = models.logits(model, IDS), dict(model.named_parameters())
    weights = {key: value.detach().clone() for key, value in weights.items()}
    result = rotated(model, "stream", "values", "down", kind=kind)
    assert deviation(model, before) < EXACT
    assert len(result.online) == 2
    same = [key for key, value in model.named_parameters() if key in weights and torch.equal(value, weights[key])]
    assert all("q_norm" in key or "k_norm" in key for key in same if key.endswith("weight"))  # the others took part


@pytest.mark.parametrize("part", ["values", "down"])
@pytest.mark.parametrize("name", models.MODELS)
def test_parts_beside_the_stream_are_exact_in_every_family(name: str, part: str) -> None:
    model = models.build(name)
    before = models.logits(model, IDS)
    rotated(model, part)
    assert deviation(model, before) < EXACT


@pytest.mark.parametrize("name", models.MODELS)
def test_auto_is_what_costs_nothing_in_every_family(name: str) -> None:
    model = models.build(name)
    before, parameters, was_tied = models.logits(model, IDS), sum(p.numel() for p in model.parameters()), tied(model)
    parts = resolved(model, "auto")
    free = not was_tied and name not in NO_STREAM and not biased_norms(model)
    assert parts == (("stream", "values") if free else ())
    rotated(model, *parts)
    assert deviation(model, before) < EXACT
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert tied(model) == was_tied


def biased_norms(model: Any) -> bool:
    return any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())


@pytest.mark.parametrize("name", vision_models.MODELS)
def test_auto_is_possible_for_every_model_that_sees(name: str) -> None:
    model = vision_models.build(name)
    parts = resolved(model, "auto")
    if parts:
        rotated(model, *parts)


def test_auto_stands_beside_what_is_named() -> None:
    model = models.build("llama")
    assert sorted(resolved(model, "down", "auto", "values")) == ["down", "stream", "values"]


@pytest.mark.parametrize("name", NO_STREAM)
def test_a_stream_that_cannot_be_rotated_says_why(name: str) -> None:
    model = models.build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=NO_STREAM[name]):
        rotated(model, "stream")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_mean_that_moves_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """LayerNorm models need more than an orthogonal matrix."""
    monkeypatch.setattr("lrquant.transforms.hadamard.keeping_mean", lambda matrix: matrix)
    model = models.build("neox")
    before = models.logits(model, IDS)
    rotated(model, "stream")
    assert deviation(model, before) > 1e-3


def test_tied_embeddings_are_untied() -> None:
    model = models.build("llama-tied")
    result = rotated(model, "stream")
    assert result.untied == models.VOCABULARY * models.WIDTH
    assert not model.config.tie_word_embeddings
    assert not model.all_tied_weights_keys
    assert rotated(models.build("llama"), "stream").untied == 0


def test_seeds_differ_and_repeat() -> None:
    def weight(seed: int) -> Tensor:
        model = models.build("llama")
        rotated(model, "stream", seed=seed)
        return model.lm_head.weight

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


# --- Models that see ---


@pytest.mark.parametrize("name", ["llava", "llava-second-last-layer", "qwen2-vl", "qwen2.5-vl", "smolvlm"])
def test_pictures_enter_the_rotated_stream(name: str) -> None:
    model = vision_models.build(name)
    (inputs,) = vision_models.inputs_of(name)
    with torch.no_grad(), InDouble():
        before = vision_models.output_of(model, inputs)
        rotated(model, "stream", "values", "down")
        after = vision_models.output_of(model, inputs)
    assert float((after - before).abs().max() / before.abs().max()) < EXACT


def test_vision_towers_have_values_alone_to_rotate() -> None:
    model = vision_models.build("vit")
    (inputs,) = vision_models.inputs_of("vit")
    with torch.no_grad(), InDouble():
        before = vision_models.output_of(model, inputs)
        rotated(model, "values")
        after = vision_models.output_of(model, inputs)
    assert float((after - before).abs().max() / before.abs().max()) < EXACT
    for part in ("stream", "down"):
        with pytest.raises(UsageError, match=f"rotate '{part}': vit models do not support it"):
            rotated(model, part)


# --- The matrices ---


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 52, 64, 80, 96, 100, 112, 896, 1536, 2304])
def test_hadamard_matrices(order: int) -> None:
    """Powers of two, Paley's first (12, 20) and second (28, 36) kind, squares of primes (52, 100), and doublings."""
    matrix = hadamard(order)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order).double())


def test_orders_without_a_construction_are_rotated_at_random_and_say_so() -> None:
    assert hadamard(6) is None  # no such matrix exists
    assert hadamard(92) is None  # it does, by other means
    from transformers import AutoConfig, AutoModelForCausalLM

    config = models.config_of("llama").to_dict() | {"hidden_size": 56, "num_attention_heads": 4, "head_dim": 14}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float64).eval()
    before = models.logits(model, IDS)
    result = rotated(model, "stream", "values")
    assert deviation(model, before) < EXACT
    assert result.notes == ["No Hadamard matrix of order 14 is known here: a random rotation is used instead."]


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("size", [24, 33, 64])
def test_matrices_are_orthogonal_and_can_keep_the_mean(size: int, kind: str) -> None:
    identity, ones = torch.eye(size).double(), torch.ones(size).double()
    for keep in (False, True):
        matrix = orthogonal_matrix(size, kind, torch.Generator().manual_seed(0), keep)
        assert torch.allclose(matrix @ matrix.T, identity, atol=1e-13)
    assert torch.allclose(ones @ matrix, ones, atol=1e-13)
    assert torch.allclose(matrix @ ones, ones, atol=1e-13)  # an orthogonal matrix keeps it on both sides
    assert torch.equal(keeping_mean(identity), identity)


def test_a_hadamard_rotation_spreads_one_channel_evenly() -> None:
    outlier = torch.zeros(64).double()
    outlier[5] = 64.0
    matrix = orthogonal_matrix(64, "hadamard", torch.Generator().manual_seed(0))
    assert torch.allclose((outlier @ matrix).abs(), torch.full((64,), 8.0).double())


@needs_compiling
def test_a_transform_at_run_time_compiles_with_its_block() -> None:
    recipe = Recipe.preset("lrquant", wbits=4, abits=16, kernels="compiled", products="float32")
    block = Line(64)
    expected = block(torch.eye(64)[None])
    add_online_transform(block.linear)
    block.linear.weight.data = BlockHadamard(64)(block.linear.weight.data)
    assert torch.allclose(block(torch.eye(64)[None]), expected, atol=1e-6)
    fixed = BlockParameters.of(block, (), recipe.scheme, torch.float32)
    learnables = {name: tensor.requires_grad_() for name, tensor in Clipping().start(fixed, Start(recipe)).items()}
    graph = CompiledBlocks(recipe, torch.device("cpu")).of(block, fixed)
    assert graph is not None
    plain = functional_call(block, dict(freeze(fixed, learnables).parameters(torch.float32)), (torch.eye(64)[None],))
    for target, close in ((plain.detach(), True), (plain.detach() + 1e-3, False)):
        means = graph(block, fixed, learnables, torch.eye(64)[None], {}, [target])
        assert means is not None
        assert bool(means[0] < 1e-10) == close
