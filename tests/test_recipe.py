"""Recipes: presets, files, and everything wrong that can be written into one."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lrquant.errors import UsageError
from lrquant.method_presets import PRESETS
from lrquant.recipe import Recipe
from lrquant.reconstruction.learnables.rates import clipping_rate, smoothing_rate

KEYS = tuple(Recipe.model_fields)


def read(tmp_path: Path, text: str | bytes) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Recipe.from_yaml(path)


def refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    """`text` is refused in one short line that names the file or the key."""
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


# --- Presets and files ---


@pytest.mark.parametrize("method", PRESETS)
def test_a_preset_survives_its_file(method: str, tmp_path: Path) -> None:
    recipe = Recipe.preset(method, wbits=3, abits=8, group_size=64, seed=7)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe


def test_a_file_takes_its_methods_values_for_what_it_leaves_out(tmp_path: Path) -> None:
    assert read(tmp_path, "method: omniquant\nwbits: 3") == Recipe.preset("omniquant", wbits=3)
    assert read(tmp_path, "method: omniquant\nabits: 16") == Recipe.preset("omniquant", abits=16)
    assert read(tmp_path, "wbits: 2") == Recipe.preset("lrquant", wbits=2)


def test_presets_are_the_published_methods() -> None:
    rtn, smoothquant, omniquant, lrquant = (Recipe.preset(m) for m in ("rtn", "smoothquant", "omniquant", "lrquant"))
    assert not rtn.learns
    assert not rtn.let
    assert not smoothquant.learns
    assert (smoothquant.let, smoothquant.init, smoothquant.alpha) == (True, "smoothquant", 0.5)
    assert (omniquant.learns, omniquant.init, omniquant.loss) == (True, "smoothquant", "mse")
    assert (lrquant.learns, lrquant.init, lrquant.loss) == (True, "log", "mse+nlc")
    # The papers' settings: 20 epochs over 128 samples, one at a time, and their learning rates.
    exact = Recipe.preset("lrquant", paper_exact=True)
    assert (exact.epochs, exact.nsamples, exact.batch_size, exact.schedule) == (20, 128, 1, "constant")
    for recipe in (exact, lrquant):
        assert (smoothing_rate(recipe, 20 * 128), clipping_rate(recipe, 20 * 128)) == (5e-3, 1e-2)
    assert lrquant.epochs * lrquant.nsamples <= exact.epochs * exact.nsamples / 3  # with rates that follow a cosine
    assert not Recipe.preset("omniquant", abits=16).let  # weight-only: clipping alone
    assert Recipe.preset("omniquant", abits=16, let=True).let


def test_a_preset_follows_the_number_format(tmp_path: Path) -> None:
    def rotated(**numbers: Any) -> tuple[str, ...]:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"method": "lrquant-max", **numbers}))
        recipe = Recipe.preset("lrquant-max", **numbers)
        assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
        return recipe.rotate

    assert rotated(wbits=4, abits=4) == rotated(wbits=6, abits=6) == ("auto",)
    assert rotated(wbits=4, abits=8) == rotated(wbits=4, abits=16) == rotated(numbers="nvfp4") == ()
    assert Recipe.preset("lrquant-max", abits=4, rotate=()).rotate == ()
    short, long = Recipe.preset("lrquant-max", abits=16).epochs, Recipe.preset("lrquant-max", abits=16, wbits=2).epochs
    assert short < long
    assert Recipe.preset("lrquant-max", abits=16, target_bits=3.5).epochs == long
    assert Recipe.preset("lrquant-max", numbers="nvfp4").epochs == long
    assert Recipe.preset("lrquant-max", abits=4, wbits=2).epochs == short
    assert Recipe.preset("lrquant-max", abits=8, wbits=4).epochs == short
    assert Recipe.preset("lrquant", abits=4).rotate == ()


def test_none_leaves_a_presets_value_and_changes_are_validated() -> None:
    assert Recipe.preset("rtn", epochs=None) == Recipe.preset("rtn")
    assert Recipe.preset("rtn").changed(wbits=3, abits=None) == Recipe.preset("rtn", wbits=3)
    with pytest.raises(UsageError, match=r"^wbits = 1: "):
        Recipe.preset("rtn").changed(wbits=1)


def test_formats_have_their_short_names() -> None:
    assert Recipe.preset(wbits=4, abits=4).format_name == "W4A4"
    assert Recipe.preset(wbits=2, abits=16, group_size=64).format_name == "W2A16 g64"


# --- One thing wrong ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wbits": 1}, "^wbits = 1: integers have 2 to 8 bits, and 16 leaves a tensor unquantized$"),
        ({"wbits": 17}, "^wbits = 17: integers have 2 to 8 bits"),
        ({"abits": 0}, "^abits = 0: integers have 2 to 8 bits"),
        ({"wbits": "four"}, "^wbits = 'four': "),
        ({"wbits": 16, "abits": 16}, "nothing would be quantized"),
        ({"group_size": 0}, "^group_size = 0: "),
        ({"epochs": -1}, "^epochs = -1: "),
        ({"let_lr": float("nan")}, "^let_lr = nan: "),
        ({"alpha": 1.5}, "^alpha = 1.5: "),
        ({"schedule": "linear"}, "^schedule = 'linear': .*'constant' or 'cosine'"),
        ({"seed": 2**64}, "^seed = "),
        ({"bits": 4}, "^unknown recipe key 'bits': there are method, "),
        ({"grupsize": 64}, "^unknown recipe key 'grupsize': there are .*group_size"),
    ],
    ids=str,
)
def test_one_wrong_value_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.preset("lrquant", **changes)


def test_unknown_methods_list_the_known(tmp_path: Path) -> None:
    message = "unknown method 'gptq': there are rtn, smoothquant, omniquant, lrquant"
    with pytest.raises(UsageError, match=f"^{message}"):
        Recipe.preset("gptq")
    with pytest.raises(UsageError, match=message):
        Recipe.parse({"method": "gptq"})
    refused(tmp_path, "method: gptq", re.escape(str(tmp_path)) + f".*{message}")


# --- Hostile files ---


@pytest.mark.parametrize(
    "text",
    [
        "wbits: !!python/object/apply:os.system [echo hacked]",
        "wbits: !!python/name:os.system",
        "!!python/object/new:lrquant.recipe.Recipe {}",
    ],
)
def test_tags_construct_nothing(tmp_path: Path, text: str) -> None:
    refused(tmp_path, text, "not valid YAML")


@pytest.mark.parametrize("text", ["", "null", "- wbits", "wbits", "4", "4: wbits", "? [wbits]\n: 4", "{wbits: 4"])
def test_what_is_no_mapping_of_names_is_no_recipe(tmp_path: Path, text: str) -> None:
    refused(tmp_path, text, "recipe.yaml: (a recipe is a mapping of option names to values|not valid YAML)")


@pytest.mark.parametrize("text", [b"wbits: \xff", b"\x00", "wbits: 2001-99-99", "wbits: " + "9" * 5000])
def test_bytes_and_numbers_that_are_none(tmp_path: Path, text: str | bytes) -> None:
    refused(tmp_path, text, "recipe.yaml: (cannot read the recipe|not valid YAML)")


def test_deep_nesting(tmp_path: Path) -> None:
    refused(tmp_path, "wbits: " + "[" * 5000 + "]" * 5000, "not valid YAML")


def test_a_huge_file_is_not_even_read(tmp_path: Path) -> None:
    refused(tmp_path, "#" * (1 << 21), "too large for a recipe")


def test_a_number_of_ten_thousand_digits(tmp_path: Path) -> None:
    refused(tmp_path, "wbits: 0x" + "f" * 10_000, "^wbits")


BOMB = (
    "a: &a ["
    + "x," * 20
    + "]\n"
    + "".join(f"{new}: &{new} [" + f"*{old}," * 20 + "]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True))
)  # 20⁹ items in 600 bytes


@pytest.mark.parametrize(
    "text",
    [
        BOMB + "wbits: *i",
        BOMB + "method: *i",
        BOMB.replace("[", "{<<: [").replace("]", "]}").replace("x,", "{x: y},") + "wbits: *i",
    ],
    ids=["value", "method", "merge"],
)
def test_aliases_do_not_explode(tmp_path: Path, text: str) -> None:
    refused(tmp_path, text, "recipe.yaml")


def test_a_list_that_holds_itself(tmp_path: Path) -> None:
    refused(tmp_path, "wbits: &a [*a]", "wbits|recipe.yaml")


@pytest.mark.parametrize("path", ["missing.yaml", ".", "a\0b"])
def test_files_that_cannot_be_read(tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError):
        Recipe.from_yaml(tmp_path / path)


# --- Anything at all ---

scalars: SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
recipes = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), values | st.integers(0, 20), max_size=6)


@given(recipes | values)
def test_any_value_is_a_recipe_or_a_usage_error(value: Any) -> None:
    try:
        recipe = Recipe.parse(value)
    except UsageError:
        return
    assert Recipe.parse(recipe.model_dump()) == recipe


punctuation = [
    ": ",
    "\n",
    "\n  ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    ", ",
    "'",
    '"',
    "? ",
    "| ",
    "#",
    "\t",
    "---\n",
    "%YAML 9\n",
]
syntax = ["&a ", "*a", "<<: ", "!!str ", "!!set ", "!!binary ", "4", "16", "-1", "1e9", ".nan", "true", "null"]
words = st.sampled_from([*KEYS, *PRESETS, *punctuation, *syntax])


@given(text=st.lists(words, max_size=12).map("".join) | st.text() | st.binary())
def test_any_file_is_a_recipe_or_a_usage_error(tmp_path_factory: pytest.TempPathFactory, text: str | bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode(errors="surrogatepass") if isinstance(text, str) else text)
    with suppress(UsageError):
        Recipe.from_yaml(path)


def test_shift_on_means_on_in_yaml_too(tmp_path: Path) -> None:
    """YAML 1.1 reads a bare `on` as true."""
    for written, meant in (("on", "on"), ("off", "off"), ("auto", "auto")):
        (tmp_path / "recipe.yaml").write_text(f"shift: {written}\n")
        assert Recipe.from_yaml(tmp_path / "recipe.yaml").shift == meant


@pytest.mark.parametrize(
    ("numbers", "loss", "dynamic"),
    [
        ({"wbits": 4, "abits": 4}, "balanced", False),
        ({"wbits": 4, "abits": 8}, "mse+nlc", True),
        ({"wbits": 2, "abits": 16}, "mse+nlc", False),
        ({"numbers": "nvfp4"}, "mse+nlc", True),
    ],
)
def test_lrquant_max_balances_its_loss_where_it_pays(numbers: dict[str, Any], loss: str, dynamic: bool) -> None:
    recipe = Recipe.preset("lrquant-max", **numbers)
    assert (recipe.loss, recipe.dynamic_loss) == (loss, dynamic)
    assert Recipe.preset("lrquant+", **numbers).loss == "mse+nlc"  # as published


@pytest.mark.parametrize(("samples", "batch"), [(1, 1), (8, 1), (32, 2), (64, 4), (128, 8), (1024, 8)])
def test_lrquant_max_takes_smaller_steps_with_fewer_samples(samples: int, batch: int) -> None:
    assert Recipe.preset("lrquant-max", nsamples=samples).batch_size == batch
    assert Recipe.preset("lrquant-max", nsamples=samples, batch_size=8).batch_size == 8
    assert Recipe.preset("lrquant", nsamples=samples).batch_size == 4


def test_pipes_devices_and_folders_are_no_recipes(tmp_path: Path) -> None:
    """Reading one of them might never end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UsageError, match="it is not a file"):
            Recipe.from_yaml(path)
