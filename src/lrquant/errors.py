"""What a user can cause, as two exceptions: wrong use (exit code 2) and work that failed (exit code 1).

Both carry one line that names the value at fault and the remedy. Nothing else is shown unless `--debug`.
"""


class LrquantError(Exception):
    """Work that failed for a reason outside the program: a missing shard, NaN weights, a full disk."""

    exit_code = 1


class UsageError(LrquantError, ValueError):
    """A request that cannot be carried out as it was put: an unknown name, a width out of range."""

    exit_code = 2


class Interrupted(KeyboardInterrupt):
    """Control-C, with a line that says what is kept."""


class RenamedWarning(FutureWarning):
    """An earlier name was used, which stays valid."""
