"""Which linears are quantized, and in which format, by patterns of their names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrquant
from lrquant.entrypoints.estimate import estimate
from lrquant.errors import UsageError
from lrquant.formats.schemes import Scheme, fits
from lrquant.recipe import Recipe
from lrquant.reconstruction.coverage import IGNORED
from tests import mixtures
from tests.tiny import SETTINGS, write_tiny

IDS = torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(1))
BLOCKS = "model.layers"
SAMPLES = [IDS[:1], IDS[1:]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("choice") / "tiny", dtype=torch.float32)


def recipe(method: str = "rtn", **changes: Any) -> Recipe:
    return Recipe.preset(method, **SETTINGS | {"quantize_attention": False} | changes)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    answer: torch.Tensor = model(IDS).logits
    return answer


def test_a_pattern_fits_a_module_and_everything_within_it() -> None:
    name = "model.layers.10.mlp.down_proj"
    assert all(fits(pattern, name) for pattern in (name, "*.down_proj", "*.mlp", "model.layers.10", "model.layers.1?"))
    assert not any(fits(pattern, name) for pattern in ("down_proj", "model.layers.1", "*.layers.1", "*.up_proj"))


def test_the_last_pattern_that_fits_counts_and_ignored_linears_have_no_format() -> None:
    scheme = recipe(
        wbits=4, abits=4, ignore=("model.layers.0",), formats={"*.mlp": {"wbits": 8}, "*.up_proj": {"abits": 16}}
    ).scheme
    first, second = scheme.within("model.layers.0"), scheme.within("model.layers.1")
    assert (first.of("mlp.up_proj").weights, first.of("mlp.up_proj").inputs) == (None, None)

    def bits(scheme: Scheme) -> tuple[int, int | None]:
        assert scheme.weights is not None
        return scheme.weights.num_bits, scheme.inputs and scheme.inputs.num_bits

    linears = ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj")
    assert [bits(second.of(linear)) for linear in linears] == [(4, 4), (8, 4), (4, None)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ignore": ("down_proj",)}, r"ignore = 'down_proj': no module .* nearest: \*\.down_proj"),
        ({"ignore": ("*.dwn_proj",)}, r"nearest: \*\.down_proj"),
        ({"only": ("lm_head",)}, r"only = 'lm_head'.*nearest: "),
        ({"only": ("*.mlp",), "ignore": ("*_proj",)}, "nothing would be quantized"),
        ({"formats": {"*.w2": {"wbits": 8}}}, r"formats of '\*\.w2': no linear of this model has such a name"),
        ({"ignore": ("*.mlp",), "formats": {"*.up_proj": {"wbits": 8}}}, "no linear of this model is quantized"),
        (
            {"formats": {"*.down_proj": {"group_size": 48}}},
            r"group size 48 does not .* --ignore 'model\.layers\.0\.mlp",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_any_work(
    changes: dict[str, Any], said: str, tiny: Path, tmp_path: Path
) -> None:
    for verb in (
        lambda: lrquant.quantize(tiny, recipe(**changes), save_dir=tmp_path / "out"),
        lambda: estimate(str(tiny), recipe(**changes)),
    ):
        with pytest.raises(UsageError, match=said):
            verb()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"formats": {"*": {"bits": 8}}}, "bits; give wbits, abits, group_size, symmetric"),
        ({"formats": {"*": {"wbits": 16}}}, "there is ignore"),
        ({"formats": {"*": {"wbits": 9}}}, "integers have 2 to 8 bits"),
        ({"formats": {"*": {"wbits": 8}}, "format": "nvfp4"}, "not with floats"),
        ({"formats": {"*": {"wbits": 8}}, "abits": 16, "target_bits": 3.0}, "not with target_bits"),
    ],
)
def test_formats_that_mean_nothing_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        recipe(**changes)


def test_patterns_survive_the_file(tmp_path: Path) -> None:
    chosen = recipe(ignore=("*.v_proj",), formats={"*.mlp": {"wbits": 8, "group_size": None}})
    chosen.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == chosen


CHOICES: dict[str, tuple[dict[str, Any], set[tuple[int, int | None, int | None]]]] = {
    # (bits of weights, group size, bits of inputs) of every group
    "ignored, asymmetric": ({"abits": 16, "group_size": 32, "ignore": ("*.down_proj",)}, {(4, 32, None)}),
    "a block": ({"abits": 4, "ignore": ("model.layers.0",), "quantize_attention": True}, {(4, None, 4)}),
    "only": ({"abits": 8, "only": ("*.mlp",)}, {(4, None, 8)}),
    "formats, weight-only": (
        {"abits": 16, "group_size": 32, "formats": {"*.down_proj": {"wbits": 8, "group_size": None}}},
        {(4, 32, None), (8, None, None)},
    ),
    "formats": (
        {
            "abits": 4,
            "ignore": ("*.v_proj",),
            "formats": {"*.down_proj": {"wbits": 8, "abits": 8}, "*.o_proj": {"abits": 16}},
        },
        {(4, None, 4), (8, None, 8), (4, None, None)},
    ),
    "learned": (
        {
            "method": "lrquant-max",
            "abits": 16,
            "group_size": 32,
            "ignore": ("*.q_proj",),
            "formats": {"*.up_proj": {"wbits": 3}},
        },
        {(4, 32, None), (3, 32, None)},
    ),
    "gptq": ({"abits": 16, "rounding": "gptq", "ignore": ("*.k_proj",), "extra": ("head",)}, {(4, None, None)}),
    "mixed precision": ({"abits": 16, "group_size": 32, "target_bits": 5.0, "ignore": ("*.mlp",)}, set()),
    "rotated down": ({"abits": 4, "ignore": ("model.layers.0.mlp",), "rotate": ("down",)}, {(4, None, 4)}),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_checkpoint_says_what_was_chosen_and_every_loader_reads_it(name: str, tmp_path: Path) -> None:
    changes, groups = CHOICES[name]
    tiny = write_tiny(tmp_path / "tiny", dtype=torch.float32, tie_word_embeddings="extra" not in changes)
    chosen = recipe(**{"wbits": 4} | changes)
    expected = estimate(str(tiny), chosen, "cpu")
    quantized = lrquant.quantize(tiny, chosen, save_dir=tmp_path / "out")
    folder, model = tmp_path / "out", AutoModelForCausalLM.from_pretrained(tiny)

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = {
        (
            group["weights"]["num_bits"],
            group["weights"]["group_size"],
            group["input_activations"] and group["input_activations"]["num_bits"],
        )
        for group in config["config_groups"].values()
    }
    assert found == groups or name == "mixed precision"
    linears = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    left = {path for path in linears if path.startswith(BLOCKS) and chosen.scheme.leaves(path)}
    assert left <= set(config["ignore"])
    assert bool(left) == bool(chosen.ignore or chosen.only)

    coverage = quantized.coverage
    assert coverage is not None
    counted = sum(part.parameters for part in coverage.left if part.reason == IGNORED)
    assert counted == sum(model.get_parameter(f"{path}.weight").numel() for path in left)
    assert (IGNORED in (folder / "README.md").read_text()) == bool(left)
    if "extra" not in changes:  # the estimate counts modules outside the blocks as they are
        assert expected.checkpoint_bytes == pytest.approx(quantized.sizes.checkpoint_bytes, rel=0.01)

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    without_attention = name != "a block"  # whose queries plain transformers leaves alone
    if without_attention:
        assert torch.equal(logits(plain), logits(lrquant.load(str(folder))))
    assert torch.allclose(logits(lrquant.load(str(folder))), logits(quantized.model), atol=1e-5)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits(again)
    if chosen.method == "rtn" and not chosen.rotate:
        for path in left:
            assert torch.equal(again.get_parameter(f"{path}.weight"), model.get_parameter(f"{path}.weight"))


def test_a_block_left_alone_answers_as_the_original_does(tiny: Path) -> None:
    """Its attention is not rounded either."""
    quantized = lrquant.quantize(tiny, recipe(wbits=2, abits=2, quantize_attention=True, ignore=("*.layers.0",)))
    assert quantized.records[0].final_loss == 0
    assert quantized.records[1].final_loss > 0


@pytest.mark.parametrize(
    ("ignore", "method"),
    [("*.mlp.experts", "lrquant"), ("*.self_attn", "compressed-tensors"), ("*.experts.1", "lrquant")],
)
def test_experts_that_are_left_need_lrquants_own_layout(ignore: str, method: str, tmp_path: Path) -> None:
    chosen = Recipe.preset("rtn", wbits=4, abits=16, group_size=32, symmetric=True, ignore=(ignore,))
    quantized = lrquant.quantize(mixtures.build("mixtral"), chosen, SAMPLES, save_dir=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == method
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(plain), logits(quantized.model), atol=1e-5)
