"""The table of runtimes against vLLM's own answers, and what `--for` chooses."""

import json
from pathlib import Path
from typing import Any

import pytest

from lrquant.errors import UsageError
from lrquant.recipe import Recipe
from lrquant.runtimes import RUNTIMES, format_of_config, served, verdicts, vllm
from lrquant.runtimes.choice import nearest_served, settings_for
from lrquant.runtimes.planned import format_of_recipe
from tests.runtimes.formats import ASKED, configuration, recipe

ANSWERS = json.loads((Path(__file__).parent / "vllm_verdicts.json").read_text())
ROWS, WIDTH = 512, 256  # of the linear that vLLM was asked about


def test_the_answers_are_of_the_version_that_the_table_names() -> None:
    assert (ANSWERS["vllm"], ANSWERS["date"]) == (vllm.VERSION, vllm.DATE)
    assert ANSWERS["verdicts"].keys() == ASKED.keys()
    assert len(ASKED) >= 24


def accepted(answer: dict[str, Any], name: str) -> bool:
    """Whether vLLM takes what lies on disk: zero points that are padded for transformers have another shape there."""
    stored = format_of_recipe(recipe(name))
    groups = WIDTH // (stored.group_size or WIDTH)
    return "scheme" in answer and not (stored.pads_zero_points and answer["zero_points"] != [ROWS, groups])


@pytest.mark.parametrize("name", ASKED)
def test_vllm_says_the_same(name: str) -> None:
    stored, answers = format_of_recipe(recipe(name)), ANSWERS["verdicts"][name]
    assert vllm.ON_CPU.judge(stored).runs == accepted(answers["cpu"], name)
    for capability in vllm.CAPABILITIES:
        answer = answers[f"cuda{capability}"]
        if "unknown" in answer:
            assert name in ("nvfp4", "fp8", "fp8-static")  # whose operations are in CUDA builds alone
            continue
        hopper_only = name == "w4a8-fp8" and capability != vllm.HOPPER
        assert (vllm.ON_CUDA.judge(stored).runs and not hopper_only) == accepted(answer, name)
        if not accepted(answer, name):
            continue
        assert vllm.scheme_of(stored, capability) == answer["scheme"]
        kernel = vllm.kernel_on_cuda(stored, capability)
        assert kernel is None or kernel == answer["kernel"]


@pytest.mark.parametrize("name", ASKED)
def test_a_recipe_and_the_configuration_it_writes_are_judged_alike(name: str) -> None:
    written = format_of_config({"quantization_config": configuration(name), "model_type": "llama"})
    planned = format_of_recipe(recipe(name), "llama")
    assert verdicts(written) == verdicts(planned)


@pytest.mark.parametrize(
    ("key", "asked", "expected"),
    [
        ("vllm", {}, {"symmetric": True, "activations_symmetric": True, "quantize_attention": False}),
        ("vllm", {"wbits": 4, "abits": 16}, {"wbits": 4, "abits": 16, "quantize_attention": False}),
        ("vllm", {"wbits": 2, "abits": 16, "group_size": 64}, {"group_size": 64}),
        ("vllm", {"wbits": 8, "abits": 8}, {"symmetric": True}),
        ("sglang", {"wbits": 8, "abits": 8}, {"symmetric": True}),
        ("llama.cpp", {}, {"abits": 16, "symmetric": True, "group_size": 32}),
        ("llama.cpp", {"wbits": 3}, {"abits": 16, "group_size": 32}),
        ("llama.cpp", {"wbits": 8}, {"symmetric": True, "group_size": 32}),
        ("llama.cpp", {"wbits": 4, "group_size": 64}, {"symmetric": True, "group_size": 64}),
        ("transformers", {"wbits": 6, "abits": 6}, {"quantize_attention": False}),
    ],
)
def test_for_a_runtime(key: str, asked: dict[str, Any], expected: dict[str, Any]) -> None:
    found = settings_for(key, asked)
    assert asked.items() <= found.items()
    assert expected.items() <= found.items()
    stored = format_of_recipe(Recipe.preset("lrquant", **found))
    runtime = next(runtime for runtime in RUNTIMES if runtime.key == key)
    assert runtime.judge(stored).runs


@pytest.mark.parametrize("key", ["vllm", "sglang", "llama.cpp"])
def test_what_is_proposed_runs_there(key: str) -> None:
    runtime = next(runtime for runtime in RUNTIMES if runtime.key == key)
    for wbits in range(2, 9):
        for abits in (2, 3, 4, 5, 6, 7, 8, 16):
            try:
                settings = settings_for(key, {"wbits": wbits, "abits": abits})
            except UsageError as refused:
                text = str(refused)
                assert "\n" not in text
                words = text.rpartition("; ")[2].split()
                settings = settings_for(
                    words[words.index("--for") + 1],
                    {"wbits": int(words[words.index("--wbits") + 1]), "abits": int(words[words.index("--abits") + 1])},
                )
            assert runtime.judge(format_of_recipe(Recipe.preset("rtn", **settings))).runs


def test_what_nothing_serves_has_a_neighbour_that_something_does() -> None:
    default = format_of_recipe(Recipe.preset("lrquant"))
    assert not served(default)
    assert nearest_served(default) == "--wbits 4 --abits 4 --for vllm"
    sixes = format_of_recipe(Recipe.preset("lrquant", wbits=6, abits=6))
    assert not served(sixes)
    assert (nearest_served(sixes) or "").startswith("--wbits 6 --abits 8 --for vllm")
    assert served(format_of_recipe(Recipe.preset("lrquant", wbits=3, abits=16)))


def test_bad_wishes_are_one_line() -> None:
    with pytest.raises(UsageError, match=r"no runtime 'ollama': there are vllm, vllm-cpu, sglang, llama\.cpp"):
        settings_for("ollama", {})
    with pytest.raises(UsageError, match=r"W6A6: does not run in vLLM on NVIDIA GPUs \(no scheme for 6-bit"):
        settings_for("vllm", {"wbits": 6, "abits": 6})
    with pytest.raises(UsageError, match="leave it out"):
        settings_for("vllm", {"quantize_attention": True})
    with pytest.raises(UsageError, match="rounds activations itself"):
        settings_for("llama.cpp", {"abits": 8})
