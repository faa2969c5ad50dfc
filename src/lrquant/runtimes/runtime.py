"""A program that runs checkpoints, and its verdict on a number format."""

from collections.abc import Callable
from dataclasses import dataclass

from lrquant.runtimes.stored_format import StoredFormat


@dataclass(frozen=True)
class Verdict:
    """Whether a program runs a format, and with what; or why not.

    `rounds`: whether it rounds activations as they were rounded while learning, where they were.
    """

    runs: bool
    how: str
    rounds: bool = True

    def __str__(self) -> str:
        return f"{'yes' if self.runs else 'no'}: {self.how}"


@dataclass(frozen=True)
class Runtime:
    """A row of the table. `command` starts it with a checkpoint's path; `{path}` stands for that."""

    key: str  # what `--for` calls it; those of one key are one program on several machines
    name: str
    version: str
    date: str
    checked: str  # how the verdicts are known
    judge: Callable[[StoredFormat], Verdict]
    command: Callable[[StoredFormat], str]


def no(why: str) -> Verdict:
    """The verdict that a format does not run, because of `why`."""
    return Verdict(False, why)


def yes(how: str, rounds: bool = True) -> Verdict:
    """The verdict that a format runs, and `how`; `rounds`: whether activations are quantized as learned."""
    return Verdict(True, how, rounds)
