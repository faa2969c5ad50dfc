"""Errors that a user can cause, as two exceptions: wrong usage (exit code 2) and failed work (exit code 1).

Both have a one-line message that names the wrong value and the remedy. Only `--debug` shows more.
"""


class LrquantError(Exception):
    """Work that failed for a reason outside the program: a missing shard, NaN weights, a full disk."""

    exit_code = 1


class UsageError(LrquantError, ValueError):
    """Wrong usage: an unknown name, a value out of range."""

    exit_code = 2


class Interrupted(KeyboardInterrupt):
    """Control-C or a scheduler's SIGTERM, with a line that says what is kept."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Control-C does."""


class RenamedWarning(FutureWarning):
    """An earlier name was used, which stays valid."""
