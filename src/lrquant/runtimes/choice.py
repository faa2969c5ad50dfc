"""`--for RUNTIME`: settings with which a result runs there with the given bits."""

from collections.abc import Mapping
from typing import Any

from lrquant.errors import UsageError
from lrquant.recipe import Recipe
from lrquant.runtimes.planned import format_of_recipe
from lrquant.runtimes.runtime import Runtime, Verdict
from lrquant.runtimes.stored_format import StoredFormat
from lrquant.runtimes.table import RUNTIMES, by_key

# What is tried, in this order, where the user leaves it open; with int8 and fewer bits, symmetric inputs come last.
_SYMMETRIC = {"symmetric": True}
_PREFERENCES: tuple[dict[str, Any], ...] = (
    {}, _SYMMETRIC, {"activations_symmetric": True}, _SYMMETRIC | {"activations_symmetric": True},
)  # fmt: skip
# llama.cpp's blocks have a scale for every 32 weights: groups of 32 take no more of them than rows.
_IN_BLOCKS: tuple[dict[str, Any], ...] = ({"group_size": 32}, {"group_size": 32} | _SYMMETRIC)
_SMALLER_BLOCK = (4, 5)  # bits that take a smaller block there without a zero point
_FORMAT_FIELDS = {
    "numbers", "input_numbers", "wbits", "abits", "group_size", "symmetric", "activations_symmetric",
    "quantize_attention", "target_bits", "rotate",
}  # fmt: skip


def settings_for(key: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` to a preset, completed by the settings that the runtime called `key` needs.

    Fields that `changes` names stay; those whose value is None are open. Queries, keys and values are left in floating
    point, since no program rounds them.

    Raises:
        UsageError: nothing of these bits runs there; the line says what does.
    """
    runtime = by_key(key)
    given = {name: value for name, value in changes.items() if value is not None}
    if given.get("quantize_attention"):
        raise UsageError(f"quantize_attention: {runtime.name} does not quantize queries, keys and values; leave it out")
    found = _found(runtime, given)
    if found is None:
        raise UsageError(_refusal(runtime, given))
    return found[0]


def _found(runtime: Runtime, given: Mapping[str, Any]) -> tuple[dict[str, Any], Verdict] | None:
    """The first settings that run; those that also round activations as learned come first."""
    own: dict[str, Any] = {"quantize_attention": False}
    preferences = _PREFERENCES
    if runtime.key == "llama.cpp":
        own |= {"abits": 16, "store": "half"}  # it rounds activations its own way, and has float16 scales
        preferences = _IN_BLOCKS[1:] if given.get("wbits", 4) in _SMALLER_BLOCK else _IN_BLOCKS
    second = None
    for preference in preferences if given.get("numbers", "int") == "int" else ({},):
        settings = own | preference | dict(given)
        verdict = runtime.judge(_format(settings))
        if verdict.runs and verdict.rounds:
            return settings, verdict
        if verdict.runs and second is None:
            second = settings, verdict
    return None if runtime.key == "llama.cpp" else second


def _format(settings: Mapping[str, Any]) -> StoredFormat:
    return format_of_recipe(
        Recipe.preset("rtn", **{name: value for name, value in settings.items() if name in _FORMAT_FIELDS})
    )


def _refusal(runtime: Runtime, given: Mapping[str, Any]) -> str:
    asked = _format({"quantize_attention": False} | dict(given))
    why = runtime.judge(asked).how
    if runtime.key == "llama.cpp" and asked.inputs is not None:
        why = "it rounds activations itself, to 8 bits on CPUs"
    name = f"W{asked.wbits}A{asked.abits}" + (f" g{asked.group_size}" if asked.group_size else "")
    instead = nearest_served(asked, runtime)
    return f"{name}: does not run in {runtime.name} ({why})" + (f"; {instead} does" if instead else "")


def nearest_served(asked: StoredFormat, runtime: Runtime | None = None) -> str | None:
    """Options for integers of nearly the bits of `asked` that `runtime`, or some program, computes with as learned.

    Symmetry is given up before bits are.
    """
    proposed = [(w, a) for a in (4, 8, 16) for w in range(2, 9)]
    proposed.sort(key=lambda bits: (abs(bits[0] - asked.wbits) + abs(bits[1] - asked.abits), -sum(bits)))
    programs = (runtime,) if runtime is not None else [row for row in RUNTIMES if row.key in ("vllm", "llama.cpp")]
    for wbits, abits in proposed:
        for group in dict.fromkeys((asked.group_size, None)):
            bits = {"wbits": wbits, "abits": abits} | ({"group_size": group} if group else {})
            for program in programs:
                found = _found(program, bits)
                if found is not None and found[1].rounds:
                    options = f"--wbits {wbits} --abits {abits}" + (f" --group-size {group}" if group else "")
                    return f"{options} --for {program.key}"
    return None
