"""A table of the programs that run checkpoints: the kernel for each number format, or why there is none."""

from lrquant.runtimes.runtime import Runtime, Verdict
from lrquant.runtimes.stored_format import Numbers, StoredFormat, format_of_config
from lrquant.runtimes.table import RUNTIMES, by_key, commands, served, verdicts

__all__ = [
    "RUNTIMES",
    "Numbers",
    "Runtime",
    "StoredFormat",
    "Verdict",
    "by_key",
    "commands",
    "format_of_config",
    "served",
    "verdicts",
]
