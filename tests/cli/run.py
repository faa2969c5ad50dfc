"""The command line as a user runs it: in this process (quick), or in one of its own."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from lrquant.cli.main import main

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "160", "NO_COLOR": "1"}


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def lrquant(*arguments: object, cwd: Path | None = None) -> Done:
    """Run `lrquant arguments…` here, with its output caught."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["lrquant", *map(str, arguments)]),
        mock.patch.dict(os.environ, ENVIRONMENT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd or Path.cwd()),
    ):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def started(*arguments: object) -> subprocess.Popen[str]:
    """Start it in a process of its own, and do not wait."""
    command = [sys.executable, "-m", "lrquant", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
        preexec_fn=_hears_control_c,
    )


def _hears_control_c() -> None:
    """What runs in the background of a script ignores Control-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def lrquant_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own."""
    command = [sys.executable, "-m", "lrquant", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | ENVIRONMENT)
