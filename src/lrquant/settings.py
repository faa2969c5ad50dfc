"""Declaration of a recipe's settings: default, description, and command-line option.

A setting is declared only once, as a field of `Recipe`. Its option, the default and panel in help, and its line in
docs/cli.md are generated from the field (`lrquant.cli.settings`).
"""

from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


HIGH_PRECISION_BITS = 16  # "16 bits" means: left in the model's own floating-point format


class Panel(StrEnum):
    """The panels of `lrquant quantize --help`, in the order in which a person decides."""

    TARGET = "What and where to"
    FORMAT = "Number format"
    CALIBRATION = "Calibration"
    METHOD = "Method and its parts"
    LEARNING = "Learning"
    MACHINE = "Machine"
    REPORT = "Evaluation and report"
    HELP = "Help"


@dataclass(frozen=True)
class Setting:
    """Metadata of a field for the command line, besides its type, default and description."""

    panel: Panel
    option: str | None = ""  # its name without dashes, or `on/off` of a switch; empty: the field's; None: no option
    rare: bool = False  # shown by --help-all only
    metavar: str | None = None
    unset: str | None = None  # what None or an empty value means, in words
    formerly: str | None = None  # the field's earlier name; with dashes, its option's


def setting(default: Any, panel: Panel, description: str, **more: Any) -> Any:
    """A field of `Recipe`.

    >>> group_size: int | None = setting(None, Panel.FORMAT, "Input channels that share a scale", unset="a row", ge=1)

    Args:
        default: the value in the default preset.
        panel: where its option stands in help.
        description: a short phrase, shown by `--help` and docs/cli.md.
        more: what else `Setting` knows of it (`option`, `rare`, `metavar`, `unset`, `formerly`), and pydantic's
            constraints (`ge`, `gt`, `le`, `lt`).
    """
    from pydantic import Field

    own = {each.name: more.pop(each.name) for each in fields(Setting) if each.name in more}
    field: FieldInfo = Field(default, description=description, **more)
    field.metadata.append(Setting(panel, **own))
    return field


def setting_of(name: str, field: "FieldInfo") -> Setting:
    """How the field called `name` was declared, its option's name filled in.

    Raises:
        TypeError: it was declared without `setting`.
    """
    found = next((part for part in field.metadata if isinstance(part, Setting)), None)
    if found is None:
        raise TypeError(f"Recipe.{name}: declare it with lrquant.settings.setting, which defines its option")
    return replace(found, option=name.replace("_", "-")) if found.option == "" else found
