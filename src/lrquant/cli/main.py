"""The `lrquant` program: its commands, and the place where errors become one line and an exit code."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lrquant.cli import console
from lrquant.cli.adapt import adapt
from lrquant.cli.bench import bench
from lrquant.cli.compare import compare
from lrquant.cli.demo import demo
from lrquant.cli.doctor import doctor
from lrquant.cli.evaluate import evaluate
from lrquant.cli.export import export
from lrquant.cli.info import info
from lrquant.cli.options import with_output_options
from lrquant.cli.quantize import quantize
from lrquant.cli.report import report
from lrquant.cli.settings import Listed, has_settings, listed
from lrquant.cli.signals import handled
from lrquant.errors import LrquantError, RenamedWarning, Terminated, UsageError
from lrquant.runtime.paths import reason

_usual_warning = warnings.showwarning

app = typer.Typer(
    name="lrquant",
    help="Post-training quantization of transformers, with a report of what it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in (
    ("quantize", quantize),
    ("adapt", adapt),
    ("eval", evaluate),
    ("demo", demo),
    ("export", export),
    ("bench", bench),
    ("report", report),
    ("info", info),
    ("compare", compare),
    ("doctor", doctor),
):
    whole = with_output_options(command)
    if has_settings(command):
        app.command(name, cls=Listed)(listed(whole))
    else:
        app.command(name)(whole)


def _show_version(wanted: bool) -> None:
    if wanted:
        from lrquant import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options that stand before a command."""
    if debug:
        os.environ["LRQUANT_DEBUG"] = "1"


def main() -> None:
    """Run the `lrquant` command."""
    run(app)


def run(program: Callable[[], object]) -> None:
    """Run a command. Exit codes: 0 done, 1 failed work, 2 wrong usage, 130 interrupted, 143 terminated."""
    warnings.showwarning = _show_warning
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars would tear ours
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("COMPRESSED_TENSORS_LOG_LEVEL", "ERROR")
    logging.getLogger("lrquant.architectures").setLevel(logging.ERROR)  # a result's notes say it, once
    try:
        with handled():
            _check_surroundings()
            program()
    except LrquantError as error:
        _fail(str(error), error.exit_code, error)
    except KeyboardInterrupt as error:
        _fail(str(error) or "interrupted", 143 if isinstance(error, Terminated) else 130, error)
    except OSError as error:
        _fail(f"{f'{error.filename}: ' if error.filename else ''}{reason(error)}", 1, error)
    except Exception as error:
        _fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1, error)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Show warnings about earlier names as one line; other warnings are for developers."""
    if issubclass(category, RenamedWarning):
        console.err.print(f"Note: {message}", markup=False, soft_wrap=True)
    else:
        _usual_warning(message, category, filename, lineno, file, line)


def _check_surroundings() -> None:
    """Raise on Windows or if the working folder was deleted; discard output if standard output is closed."""
    if sys.platform == "win32":
        raise UsageError("lrquant does not run on Windows; use WSL (the Windows Subsystem for Linux)")
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the working folder was deleted; change to one that exists") from None
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the program ends


def _fail(line: str, code: int, error: BaseException) -> None:
    if os.environ.get("LRQUANT_DEBUG"):
        raise error
    console.error(line)
    sys.exit(code)


if __name__ == "__main__":
    main()
