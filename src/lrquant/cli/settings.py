"""Options generated from `Recipe`'s fields, with each field's description, panel and defaults.

A command marked by `takes_settings` has a parameter `settings`, which receives the given values by field. Its options
are created when the command is used, because the recipe needs pydantic, which would slow down `lrquant --help`.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand
from typer.models import ArgumentInfo

from lrquant.cli.completion import calibration_names, method_names
from lrquant.errors import RenamedWarning
from lrquant.settings import Panel, Setting, setting_of

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Command = Callable[..., None]

COMPLETION = {"calibration": calibration_names, "method": method_names}

# Where the options that no recipe holds stand in help; what is not named here is about evaluation and the report.
PANELS = {
    Panel.TARGET: ("reference", "save_dir", "recipe", "dry_run", "restart", "push_to_hub", "private"),
    Panel.FORMAT: ("format", "runtime"),
    Panel.CALIBRATION: ("data", "statistics", "save_statistics"),
    Panel.METHOD: ("lr_plus", "paper_exact", "blocks"),
    Panel.MACHINE: ("device", "activations", "trust_remote_code"),
}
RARE = ("lr_plus", "statistics", "save_statistics", "activations", "private", "num_fewshot", "limit", "log_to")


def takes_settings(*, epilog: str | None = None, **defaults: Any) -> Callable[[Command], Command]:
    """Mark a command as one with an option for every setting of a recipe.

    Args:
        epilog: text at the end of its help.
        defaults: the only settings that it takes, and what help shows as its own defaults; none: all settings.
    """

    def mark(command: Command) -> Command:
        command.__dict__["takes_settings"] = (epilog, defaults)
        return command

    return mark


def has_settings(command: Command) -> bool:
    """Whether `takes_settings` marked it."""
    return "takes_settings" in command.__dict__


def listed(command: Command) -> Command:
    """A command without parameters that represents `command` until it is used."""

    def stub() -> None: ...

    stub.__doc__ = command.__doc__
    stub.__dict__["command"] = command
    return stub


class Listed(TyperCommand):
    """The program's entry for a command from `listed`."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self.whole(parent).make_context(info_name, args, parent, **extra)

    def whole(self, parent: Any | None) -> Any:
        """The command with all its options."""
        command: Command = self.callback.__dict__["command"]
        epilog, defaults = command.__dict__["takes_settings"]
        inherited = {} if parent is None else parent.command.context_settings  # None: parsed by itself
        app = typer.Typer(add_completion=False, context_settings=inherited)
        app.command(self.name, cls=Whole, epilog=epilog)(with_settings(command, defaults))
        return typer.main.get_command(app)


class Whole(TyperCommand):
    """A command that hides rare options from --help, and knows the earlier names of options."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = Panel.HELP  # type: ignore[attr-defined]
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = former_options()
        for index, (name, *value) in enumerate(argument.split("=", 1) for argument in args):
            if name == "--":
                break
            if name in names:
                warnings.warn(f"{name} is now called {names[name]}", RenamedWarning, stacklevel=2)
                args[index] = "=".join([names[name], *value])
        return super().parse_args(ctx, args)


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        typer.echo(context.get_help())
        raise typer.Exit


def with_settings(command: Command, defaults: Mapping[str, Any]) -> Command:
    """`command` with options in place of its parameter `settings`, all of them in the order of the panels."""
    from lrquant.recipe import Recipe

    fields = {name: Recipe.model_fields[name] for name in defaults or Recipe.model_fields}
    offered = {name: field for name, field in fields.items() if setting_of(name, field).option is not None}

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        given.pop("help_all")
        values = {name: _plain(offered[name], given.pop(name)) for name in offered}
        command(settings={name: value for name, value in values.items() if value is not None}, **given)

    own = inspect.signature(command).parameters
    parameters = {name: _placed(each) for name, each in own.items() if name != "settings"}
    for name, field in offered.items():
        shown = default_words(name) if name not in defaults else words_of(defaults[name], field)
        parameters[name] = _keyword(name, option_of(name, field, shown))
    parameters["help_all"] = _keyword("help_all", HelpAll, False)
    order = sorted(parameters.values(), key=_place)
    wrapped.__signature__ = inspect.Signature(order)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {each.name: each.annotation for each in order}
    return wrapped


def _keyword(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _placed(parameter: inspect.Parameter) -> inspect.Parameter:
    """An option of the command's own, in its panel."""
    info = parameter.annotation.__metadata__[0]
    if isinstance(info, ArgumentInfo):
        return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    info = copy(info)
    info.rich_help_panel = next((panel for panel, names in PANELS.items() if parameter.name in names), Panel.REPORT)
    info.hidden = parameter.name in RARE
    return parameter.replace(
        kind=inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[parameter.annotation.__origin__, info]
    )


def _place(parameter: inspect.Parameter) -> tuple[int, bool]:
    """Where a parameter stands in help: arguments first, and the method before what qualifies it."""
    info = parameter.annotation.__metadata__[0]
    panel = -1 if isinstance(info, ArgumentInfo) else list(Panel).index(info.rich_help_panel)
    return panel, parameter.name in PANELS[Panel.METHOD]


def option_of(name: str, field: "FieldInfo", shown: str) -> Any:
    """The typer annotation of a field's option."""
    how = setting_of(name, field)
    kind = _kind(field)
    given = typer.Option(
        *_names(name, how, kind is bool),
        help=f"{field.description}.",
        show_default=shown,
        metavar=how.metavar,
        hidden=how.rare,
        rich_help_panel=how.panel,
        autocompletion=COMPLETION.get(name),
    )
    return Annotated[kind | None, given]


def _names(name: str, how: Setting, switch: bool) -> Iterator[str]:
    assert how.option is not None
    on, _, off = how.option.partition("/")
    if switch:
        yield f"--{on}/--{off or f'no-{on}'}"
        return
    yield f"--{on}"
    if on != name.replace("_", "-"):
        yield f"--{name.replace('_', '-')}"


def _kind(field: "FieldInfo") -> Any:
    """The type of a field's option: lists of known words are given with commas, others by repeating the option."""
    kind = next((each for each in get_args(field.annotation) if each is not NoneType), None)
    kind = kind if NoneType in get_args(field.annotation) else field.annotation
    if get_origin(kind) is not tuple:
        return kind
    return list[str] if get_args(kind)[0] is str else str


def _plain(field: "FieldInfo", given: Any) -> Any:
    """A given value as the recipe takes it."""
    if isinstance(given, list):
        return tuple(given) or None
    if isinstance(given, str) and _kind(field) is str and "tuple" in str(field.annotation):
        return tuple(given.split(","))
    return given


def former_options() -> dict[str, str]:
    """Earlier names of options, and what they are called now."""
    from lrquant.recipe import Recipe

    names = {}
    for name, field in Recipe.model_fields.items():
        how = setting_of(name, field)
        if how.formerly and how.option:
            former = how.formerly.replace("_", "-")
            names[f"--{former}"] = f"--{how.option}"
            names[f"--no-{former}"] = f"--no-{how.option}"
    return names


def words_of(value: Any, field: "FieldInfo") -> str:
    """A field's value as help shows it."""
    if value is None or value == ():
        return setting_of("", field).unset or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def default_words(name: str) -> str:
    """A setting's default in every preset: `6; rtn, smoothquant: 0; lrquant-max: 10, with weights below 4 bits 24`."""
    from lrquant.method_presets import ADJUSTMENTS, PRESETS
    from lrquant.recipe import Recipe

    field = Recipe.model_fields[name]
    usual = words_of(field.default, field)
    methods: dict[str, list[str]] = {}
    for method, preset in PRESETS.items():
        words = [words_of(preset.get(name, field.default), field)]
        for condition, changes in ADJUSTMENTS:
            if name in changes.get(method, {}):
                words.append(f"{words_of(changes[method][name], field)} {condition}")
        methods.setdefault(", ".join(words), []).append(method)
    others = [f"{', '.join(names)}: {words}" for words, names in methods.items() if words != usual]
    return "; ".join([usual, *others])


HelpAll = Annotated[
    bool,
    typer.Option(
        "--help-all", is_eager=True, callback=_show_all, rich_help_panel=Panel.HELP, help="Show every option and exit."
    ),
]
