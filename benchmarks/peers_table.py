"""The rows and methods of `benchmarks/peers.py`, and the tables that its results make."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Number formats, in the words of lrquant's recipe. The peers leave queries, keys and values alone.
LEFT_ALONE = {"quantize_attention": False}
ROWS: dict[str, dict[str, Any]] = {
    "W4A16 g128": {"wbits": 4, "abits": 16, "group_size": 128},
    "W3A16 g128": {"wbits": 3, "abits": 16, "group_size": 128},
    "W2A16 g64": {"wbits": 2, "abits": 16, "group_size": 64},
    "W4A16": {"wbits": 4, "abits": 16},
    "W3A16": {"wbits": 3, "abits": 16},
    "W2A16": {"wbits": 2, "abits": 16},
    "W3A16 g64": {"wbits": 3, "abits": 16, "group_size": 64},
    "W8A8": {"wbits": 8, "abits": 8} | LEFT_ALONE,
    "W4A8": {"wbits": 4, "abits": 8} | LEFT_ALONE,
    "W4A4": {"wbits": 4, "abits": 4} | LEFT_ALONE,
    "W4A4 qkv": {"wbits": 4, "abits": 4},
    "NVFP4": {"numbers": "nvfp4", "wbits": 4, "abits": 4} | LEFT_ALONE,
    "MXFP4": {"numbers": "mxfp4", "wbits": 4, "abits": 4} | LEFT_ALONE,
}
MORE_ROWS = ("W3A16 g64", "W8A8")  # run where they are asked for
OURS = ("rtn", "smoothquant", "omniquant", "lrquant", "lrquant+", "lrquant-max")
# Name: the script of `benchmarks/peers/` and what it calls the method.
PEERS = {
    **{
        f"llm-compressor/{method}": ("llmcompressor_side.py", method)
        for method in ("rtn", "smoothquant+gptq", "gptq", "awq", "spinquant+gptq")
    },
    **{f"auto-round/{method}": ("autoround_side.py", method) for method in ("default", "best")},
}
FULL = "full precision"
MEASURES = ("seconds", "peak_bytes", "bytes")


def fitted(numbers: dict[str, Any], widths: Iterable[int]) -> dict[str, Any]:
    """`numbers` with the largest group, up to the one they ask for, that divides every linear's width."""
    asked, widths = numbers.get("group_size"), set(widths)
    if asked is None:
        return numbers
    fits = (group for group in range(asked, 0, -1) if not any(width % group for width in widths))
    return numbers | {"group_size": next(fits)}


def impossible(method: str, numbers: dict[str, Any]) -> str | None:
    """Why a peer cannot do these numbers; None where it can, or where trying tells."""
    if method in PEERS and numbers["abits"] < 16 and numbers.get("quantize_attention", True):
        return f"{method.partition('/')[0]} leaves queries, keys and values in floating point"
    return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results in a file; a last line that an interruption cut off does not count."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add one result, on a line of its own even where the one before was cut off."""
    cut_off = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as stream:
        stream.write("\n" * cut_off + json.dumps(line) + "\n")


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and sample standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(lines: list[dict[str, Any]], row: str, methods: Iterable[str], texts: list[str]) -> str:
    """The markdown table of one row: the best mean of every text is bold, what is missing has its reason below."""
    full = [line for line in lines if line["method"] == FULL]
    done: dict[str, list[dict[str, Any]]] = {}
    reasons: dict[str, str] = {}
    for line in lines:
        if line["row"] == row and "perplexity" in line:
            done.setdefault(line["method"], []).append(line)
        elif line["row"] == row:
            reasons[line["method"]] = line["missing"]
    means = {
        name: [statistics.mean(line["perplexity"][text] for line in done[name]) for text in texts] for name in done
    }
    best = [min((values[place] for values in means.values()), default=None) for place in range(len(texts))]
    printed = [f"| {row} | {' | '.join(texts)} | seconds | peak MB | MB on disk |", "|---|" + "---|" * (len(texts) + 3)]
    for line in full[:1]:
        printed.append(f"| {FULL} | " + " | ".join(f"{line['perplexity'][text]:.3f}" for text in texts) + " | | | |")
    notes, most = [], max((len(done[name]) for name in done), default=0)
    for name in methods:
        if name in done:
            cells = []
            for place, text in enumerate(texts):
                cell = spread([line["perplexity"][text] for line in done[name]])
                cells.append(f"**{cell}**" if means[name][place] == best[place] else cell)
            unsaved = next((line["unsaved"] for line in done[name] if line.get("unsaved")), None)
            cells += [_measure(done[name], measure) for measure in MEASURES]
            printed.append(f"| {name} | {' | '.join(cells)} |")
            if len(done[name]) < most:
                notes.append(f"{name}: {len(done[name])} of {most} seeds.")
            notes += [f"{name} has no file format for this: {unsaved}."] if unsaved else []
        elif name in reasons:
            printed.append(f"| {name} | " + " | ".join("—" for _ in range(len(texts) + 3)) + " |")
            notes.append(f"{name}: {reasons[name].rstrip('.')}.")
    return "\n".join([*printed, *("\n" + note for note in notes)])


def overview(lines: list[dict[str, Any]], rows: Iterable[str], methods: Iterable[str], text: str) -> str:
    """One markdown table of all rows for one text, methods down, number formats across; a row's best is bold."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        if "perplexity" in line:
            found.setdefault((line["method"], line["row"]), []).append(line["perplexity"][text])
    rows = [row for row in rows if any(key[1] == row for key in found)]
    methods = [name for name in methods if any(key[0] == name for key in found)]
    best = {row: min(statistics.mean(found[name, row]) for name in methods if (name, row) in found) for row in rows}
    printed = [f"| {text} | {' | '.join(rows)} |", "|---|" + "---|" * len(rows)]
    for name in methods:
        cells = []
        for row in rows:
            values = found.get((name, row))
            cell = "" if values is None else spread(values)
            is_best = values is not None and statistics.mean(values) == best[row]
            cells.append(f"**{cell}**" if is_best else cell)
        printed.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(printed)


def _measure(lines: list[dict[str, Any]], measure: str) -> str:
    values = [line[measure] for line in lines if line.get(measure) is not None]
    if not values:
        return "—"
    mean = statistics.mean(values)
    return (
        f"{mean:.0f}"
        if measure == "seconds"
        else f"{mean / 1e6:.0f}"
        if measure == "peak_bytes"
        else f"{mean / 1e6:.2f}"
    )
