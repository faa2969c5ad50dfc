"""Options come from the recipe's fields: each once, in its panel, with the defaults that presets really have."""

import re
from pathlib import Path
from typing import Any

import pytest

from lrquant.cli.completion import FORMAT_NAMES
from lrquant.cli.settings import default_words, words_of
from lrquant.errors import RenamedWarning, UsageError
from lrquant.formats.presets import FORMATS
from lrquant.method_presets import PRESETS
from lrquant.recipe import Recipe
from lrquant.settings import Panel, setting_of
from tests.cli.run import lrquant
from tests.tiny import write_tiny

FIELDS = Recipe.model_fields
OFFERED = {name: how for name, field in FIELDS.items() if (how := setting_of(name, field)).option is not None}
QUICK = ["--method", "rtn", "--calib", "zoo:pydoc", "--nsamples", "2", "--seqlen", "32", "--no-report"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=False)


def help_of(*arguments: str) -> str:
    done = lrquant(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_setting_has_an_option_under_help_all_and_common_ones_under_help() -> None:
    common, everything = help_of("quantize", "--help"), help_of("quantize", "--help-all")
    for how in OFFERED.values():
        option = re.compile(rf"(?m)--{re.escape(str(how.option).partition('/')[0])}[\s,]")
        assert option.search(everything), how.option
        assert bool(option.search(common)) is not how.rare, how.option
    assert "--help-all" in common


def test_panels_stand_in_the_order_in_which_a_person_decides() -> None:
    shown = help_of("quantize", "--help")
    places = [shown.index(f"─ {panel} ") for panel in Panel]
    assert places == sorted(places)
    assert shown.index("Examples:") > places[-1]
    assert shown.count("lrquant quantize MODEL") == 3


@pytest.mark.parametrize("method", PRESETS)
def test_shown_defaults_are_the_presets_own(method: str) -> None:
    """`6; rtn, smoothquant: 0; lrquant-max: 10, 24 for weights below 4 bits …`: read back what it says of a method."""
    for name in OFFERED.keys() - {"method", "abits", "wbits"}:
        usual, *others = default_words(name).split("; ")
        said = [part.partition(": ")[2] for part in others if method in part.partition(": ")[0].split(", ")]
        values = said[0].split(", ") if said else [usual]
        plain, *formats = ({"abits": 8}, {"abits": 16}, {"abits": 4}, {"abits": 8, "wbits": 2})
        assert words_of(getattr(Recipe.preset(method, **plain), name), FIELDS[name]) == values[0]
        for numbers in formats:
            actual = words_of(getattr(Recipe.preset(method, **numbers), name), FIELDS[name])
            assert any(value.partition(" for ")[0] == actual for value in values), (name, numbers, actual, values)


def test_epochs_are_shown_as_the_presets_have_them() -> None:
    """The one that was once wrong."""
    assert default_words("epochs").startswith("6; rtn, smoothquant: 0; lrquant-max: 10, 24 for weights below 4 bits")


def test_help_names_every_format() -> None:
    assert set(FORMATS) == set(FORMAT_NAMES)
    assert all(name in help_of("quantize", "--help") for name in FORMATS)


def test_help_names_every_method() -> None:
    words = str(FIELDS["method"].description).partition(": ")[2]
    assert words.replace(" or ", ", ").split(", ") == list(PRESETS)


@pytest.mark.parametrize(
    ("former", "now", "value"),
    [("also", "extra", ("head",)), ("orthogonal", "rotate", ("stream",)), ("rotation", "rotation_vectors", False)],
)
def test_earlier_names_of_recipe_keys_stay_valid(former: str, now: str, value: Any, tmp_path: Path) -> None:
    with pytest.warns(RenamedWarning, match=f"^{former} is now called {now}$"):
        assert getattr(Recipe.preset("lrquant+", **{former: value}), now) == value
    with pytest.warns(RenamedWarning):
        assert getattr(Recipe.preset("lrquant+").changed(**{former: value}), now) == value
    (tmp_path / "recipe.yaml").write_text(f"method: lrquant+\n{former}: {list(value) if value else 'false'}\n")
    with pytest.warns(RenamedWarning):
        assert getattr(Recipe.from_yaml(tmp_path / "recipe.yaml"), now) == value
    with pytest.raises(UsageError, match=f"{former} is now called {now}: give only one of them"):
        Recipe.parse({former: value, now: value})


def test_earlier_names_of_options_stay_valid_and_say_the_new_one(tiny: Path, tmp_path: Path) -> None:
    given = ["--also", "head", "--orthogonal=values", "--no-rotation", "--save-dir", tmp_path / "out"]
    done = lrquant("quantize", tiny, *QUICK, *given)
    assert done.returncode == 0, done.stderr
    recipe = Recipe.from_yaml(tmp_path / "out" / "recipe.yaml")
    assert (recipe.extra, recipe.rotate, recipe.rotation_vectors) == (("head",), ("values",), False)
    for line in ("--also is now called --extra", "--orthogonal is now called --rotate", "--no-rotation is now called"):
        assert done.stderr.count(line) == 1


def test_a_field_without_a_panel_is_refused() -> None:
    from pydantic import BaseModel

    class Careless(BaseModel):
        depth: int = 1

    with pytest.raises(TypeError, match=r"Recipe\.depth: declare it with lrquant\.settings\.setting"):
        setting_of("depth", Careless.model_fields["depth"])


def test_adapt_shares_settings_and_shows_its_own_defaults() -> None:
    shown = " ".join(re.sub(r"[│\s]+", " ", help_of("adapt", "--help-all")).split())
    for words in (
        "--epochs N",
        "(5)",
        "--nsamples N",
        "(128)",
        "--seqlen TOKENS",
        "(as in calibration)",
        "(neutral)",
    ):
        assert words in shown
    assert "--wbits" not in shown
