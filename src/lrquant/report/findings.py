"""Conclusions from a run's numbers, in sentences for readers who do not know the method."""

from dataclasses import dataclass
from statistics import median
from typing import Literal

from lrquant.reconstruction.records import OUTCOME_WORDS
from lrquant.report.run import Block, Metric, Run

Tone = Literal["good", "bad", "plain"]
LEVEL = 0.01  # changes below one percent are called none


@dataclass(frozen=True)
class Finding:
    """A conclusion from a run's numbers: a headline, a sentence, and whether it is good news."""

    title: str
    text: str
    tone: Tone = "plain"


def findings(run: Run) -> list[Finding]:
    """The findings that `run` has numbers for, the most important first."""
    told = [_size(run), *(_quality(metric) for metric in run.metrics)]
    if run.kind == "adapt":
        told.append(_adapted(run))
    told += [_hardest(run), _smoothing(run), _learning(run), _layer(run), _depth(run), _odd_blocks(run)]
    return [finding for finding in told if finding is not None]


def own_error(block: Block) -> float | None:
    """The error that a block adds by itself, on the original's own input."""
    return block.errors.own.relative if block.errors and block.errors.own else None


def hardest_block(run: Run) -> Block | None:
    """The block that adds the largest error by itself; None where there is no other to compare it with."""
    known = [block for block in run.blocks if own_error(block) is not None]
    return max(known, key=lambda block: own_error(block) or 0.0) if len(known) > 1 else None


def stands_out(block: Block) -> str:
    """Why a reader should look at this block; empty when there is nothing."""
    odd = {name: words for name, words in OUTCOME_WORDS.items() if name not in ("initial", "learned")}
    odd["not relearned"] = "unchanged from the checkpoint"
    told = [odd[block.outcome]] if block.outcome in odd else []
    if block.recoveries:
        told.append(f"non-finite loss, recovered {block.recoveries}×")
    if block.restored:
        told.append("finished before an interruption" + ("" if block.sensitivity else "; not measured again"))
    return "; ".join(told)


def change(before: float, after: float) -> str:
    """`after` against `before` as a signed percentage."""
    return f"{100 * (after / before - 1):+.1f}%" if before else "–"


def _size(run: Run) -> Finding | None:
    if not run.checkpoint_bytes or not run.original_bytes:
        return None
    ratio = run.original_bytes / run.checkpoint_bytes
    bits = f", {run.bits_per_weight:.2f} bits per quantized weight" if run.bits_per_weight else ""
    text = f"{run.checkpoint_bytes / 1e6:.1f} MB instead of {run.original_bytes / 1e6:.1f} MB{bits}."
    return Finding(f"{ratio:.2f} times smaller", text, "good" if ratio > 1 else "bad")


def _quality(metric: Metric) -> Finding | None:
    if metric.before is None:
        return None
    worse = metric.after > metric.before if metric.better == "lower" else metric.after < metric.before
    moved = "rises" if metric.after > metric.before else "falls" if metric.after < metric.before else "stays"
    detail = f", on {metric.detail}" if metric.detail else ""
    return Finding(
        f"{metric.name[:1].upper()}{metric.name[1:]} {moved} ({change(metric.before, metric.after)})",
        f"{metric.before:.3f} before, {metric.after:.3f} after{detail}. {metric.better.capitalize()} is better.",
        "plain" if worse else "good",
    )


def _adapted(run: Run) -> Finding | None:
    pairs = [
        (before, after)
        for metric in run.metrics
        for before, after in zip(metric.windows_before, metric.windows_after, strict=True)
    ]
    if not pairs:
        return None
    better = sum(after < before for before, after in pairs)
    return Finding(
        f"Adaptation helped {better} of {len(pairs)} windows of text",
        "A window counts when the adapted model finds its text more likely than the checkpoint did.",
        "good" if 2 * better > len(pairs) else "plain",
    )


def _hardest(run: Run) -> Finding | None:
    known = [block for block in run.blocks if own_error(block) is not None]
    hardest = hardest_block(run)
    if hardest is None:
        return None
    easiest = min(known, key=lambda block: own_error(block) or 0.0)
    return Finding(
        f"Block {hardest.index} was the hardest",
        f"On the full-precision input, the output of the quantized block has a relative error of "
        f"{own_error(hardest) or 0:.1%}. The easiest is block {easiest.index}, with {own_error(easiest) or 0:.1%}.",
    )


def _smoothing(run: Run) -> Finding | None:
    pairs = {
        block.index: (block.errors.plain.relative, block.errors.smoothed.relative)
        for block in run.blocks
        if block.errors and block.errors.plain and block.errors.smoothed
    }
    if not pairs:
        return Finding("No smoothing in this run", "Channels keep their scale.") if run.kind == "quantize" else None
    changes = {index: after / before - 1 for index, (before, after) in pairs.items() if before}
    helped = sum(value < 0 for value in changes.values())
    middle = median(changes.values())
    best = min(changes, key=lambda index: changes[index])
    verdict = "helped" if middle < -LEVEL else "hurt" if middle > LEVEL else "made no difference"
    ratios = [
        (kept.outlier_ratio, kept.smoothed_outlier_ratio)
        for block in run.blocks
        for kept in block.inputs
        if kept.smoothed_outlier_ratio
    ]
    outliers = ""
    if ratios:
        before, after = max(ratios)
        effect = "and" if after < (1 - LEVEL) * before else "and still"
        outliers = (
            f" The strongest outlier channel was {before:.1f} times the median channel before smoothing {effect} "
            f"{after:.1f} times after it."
        )
    return Finding(
        f"Smoothing {verdict}",
        f"Smoothing alone lowers the output error of {helped} of {len(changes)} blocks compared with plain rounding. "
        f"The median change is {middle:+.1%}; the best is {changes[best]:+.1%} (block {best}).{outliers}",
        "good" if verdict == "helped" else "bad" if verdict == "hurt" else "plain",
    )


def _learning(run: Run) -> Finding | None:
    pairs = {
        block.index: (block.errors.start.relative, block.errors.end.relative)
        for block in run.blocks
        if block.errors and block.errors.start and block.errors.end and block.epoch_losses
    }
    changes = {index: after / before - 1 for index, (before, after) in pairs.items() if before}
    if not changes:
        return None
    helped, middle = sum(value < 0 for value in changes.values()), median(changes.values())
    return Finding(
        f"Learning {'helped' if middle < -LEVEL else 'hurt' if middle > LEVEL else 'made little difference'}",
        f"Learning lowers the output error of {helped} of {len(changes)} blocks. The median change is {middle:+.1%}.",
        "good" if middle < -LEVEL else "plain",
    )


def _layer(run: Run) -> Finding | None:
    layers = [(entry, block) for block in run.blocks for entry in block.sensitivity]
    if not layers:
        return None
    entry, block = max(layers, key=lambda pair: _left(pair[0].plain, pair[0].final))
    return Finding(
        f"The most sensitive layer is {entry.layer} of block {block.index}",
        f"When only this layer is quantized, its block's output has an error of "
        f"{_left(entry.plain, entry.final):.1%} ({entry.plain:.1%} with plain rounding).",
    )


def _left(plain: float, final: float | None) -> float:
    return plain if final is None else final


def _depth(run: Run) -> Finding | None:
    ends = [block for block in run.blocks if block.errors and block.errors.end]
    if not ends or ends[-1].errors is None or ends[-1].errors.end is None:
        return None
    last = ends[-1].errors.end
    return Finding(
        f"After the last block the relative error is {last.relative:.1%}",
        f"Errors add up over depth. The cosine similarity of the quantized and the full-precision hidden states is "
        f"{last.cosine:.4f} there; 1 means the same direction.",
    )


def _odd_blocks(run: Run) -> Finding | None:
    odd = [block for block in run.blocks if stands_out(block) and block.outcome != "not relearned"]
    if not odd:
        return None
    text = ". ".join(f"Block {block.index}: {stands_out(block)}" for block in odd[:8])
    more = f". And {len(odd) - 8} more" if len(odd) > 8 else ""
    title = "1 block needs attention" if len(odd) == 1 else f"{len(odd)} blocks need attention"
    return Finding(title, f"{text}{more}.", "bad")
