"""The figures of one run's report, each a function from the run to a matplotlib figure (or None: nothing to show)."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from lrquant.report.findings import hardest_block, stands_out
from lrquant.report.run import Block, Error, Run
from lrquant.report.style import FINAL, GRID, INHERITED, MUTED, PLAIN, START, WARN, between, canvas, plain_log_ticks

Measurements = Mapping[str, Tensor]
MOST_LAYERS = 24  # of the sensitivity figure
MOST_LINES = 16  # more blocks than this share colours rather than labels
MOST_BINS = 40  # parts of a text whose mean is a point


def _blocks(run: Run, kind: str) -> tuple[list[int], list[Error]]:
    """Indices and errors of the blocks that have an error of this kind."""
    found = [
        (block.index, getattr(block.errors, kind))
        for block in run.blocks
        if block.errors and getattr(block.errors, kind)
    ]
    return [index for index, _ in found], [error for _, error in found]


def _block_axis(axes: Axes, run: Run) -> None:
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    last = max((block.index for block in run.blocks), default=0)
    axes.set_xlim(-0.05 * last - 0.1, 1.05 * last + 0.1)
    for block in run.blocks:
        if stands_out(block) and block.outcome != "not relearned":
            axes.axvspan(block.index - 0.4, block.index + 0.4, color=WARN, alpha=0.15, linewidth=0)


def depth(run: Run) -> Figure | None:
    """Error of the quantized stream along the depth, and what each block adds by itself."""
    if not _blocks(run, "end")[0]:
        return None
    figure, axes = canvas(2.9)
    for kind, label, colour, style in (
        ("end", "quantized against full-precision hidden states", FINAL, "o-"),
        ("inherited", "inherited from earlier blocks", INHERITED, "s--"),
        ("own", "the block by itself", START, "^-"),
    ):
        indices, errors = _blocks(run, kind)
        if indices:
            axes.plot(indices, [error.relative for error in errors], style, color=colour, label=label)
    _block_axis(axes, run)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("relative output error")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1)
    return figure


def steps(run: Run) -> Figure | None:
    """Each block's error on the same input: plain rounding, smoothing alone, everything learned."""
    indices, plain = _blocks(run, "plain")
    if not indices:
        return None
    smoothed = {block.index: block.errors.smoothed for block in run.blocks if block.errors and block.errors.smoothed}
    figure, axes = canvas(2.9)
    reference = {index: error.relative for index, error in zip(indices, plain, strict=True)}
    axes.axhline(1, color=PLAIN, linewidth=1.4, label="plain rounding")
    shown = [
        ("smoothing alone", START, "s", smoothed),
        ("as quantized", FINAL, "o", dict(zip(*_blocks(run, "end"), strict=True))),
    ]
    for label, colour, marker, errors in shown:
        known = [(index, error.relative / reference[index]) for index, error in errors.items() if reference.get(index)]
        if known:
            axes.plot(*zip(*known, strict=True), marker + "-", color=colour, label=label)
    _block_axis(axes, run)
    axes.set_ylabel("error / error of plain rounding")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def cosine(run: Run) -> Figure | None:
    """1 − cosine of the block's output to the original's, before and after learning."""
    indices, ends = _blocks(run, "end")
    if not indices:
        return None
    figure, axes = canvas(2.7)
    started, starts = _blocks(run, "start")
    for x, errors, label, colour, style in (
        (started, starts, "before learning", START, "s--"),
        (indices, ends, "at the end", FINAL, "o-"),
    ):
        if x:
            axes.semilogy(x, [max(1 - error.cosine, 1e-8) for error in errors], style, color=colour, label=label)
    _block_axis(axes, run)
    plain_log_ticks(axes)
    axes.set_ylabel("1 − cosine similarity")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def losses(run: Run) -> Figure | None:
    """Each block's loss by epoch, over the loss that it started with."""
    learned = [block for block in run.blocks if block.epoch_losses and block.initial_loss]
    if not learned:
        return None
    figure, axes = canvas(3.0)
    for place, block in enumerate(learned):
        colour = between(place / max(1, len(learned) - 1))
        assert block.initial_loss
        values = [1.0, *(loss / block.initial_loss for loss in block.epoch_losses)]
        odd = bool(stands_out(block))
        label = f"block {block.index}" if odd or len(learned) <= MOST_LINES else None
        axes.plot(range(len(values)), values, "o-", color=WARN if odd else colour, label=label, markersize=3)
    if len(learned) > MOST_LINES:
        axes.set_title("colour: from the first block (yellow) to the last (blue)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss / initial loss")
    return figure


def sensitivity(run: Run) -> Figure | None:
    """The layers whose quantization alone moves their block's output most."""
    layers = [(f"{block.index} · {entry.layer}", entry) for block in run.blocks for entry in block.sensitivity]
    if not layers:
        return None
    final = any(entry.final is not None for _, entry in layers)
    layers.sort(key=lambda pair: pair[1].final if pair[1].final is not None else pair[1].plain, reverse=True)
    shown = layers[:MOST_LAYERS][::-1]
    figure, axes = canvas(0.8 + 0.19 * len(shown))
    rows = range(len(shown))
    if final:
        ends = [entry.final for _, entry in shown]
        axes.hlines(rows, [entry.plain for _, entry in shown], ends, color=GRID, linewidth=3)
        axes.plot(ends, rows, "o", color=FINAL, label="as quantized")
    axes.plot([entry.plain for _, entry in shown], rows, "s", color=PLAIN, label="plain rounding")
    axes.set_yticks(list(rows), [name for name, _ in shown], fontsize=7.5)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_xlabel("relative error of the block's output")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def outliers(run: Run) -> Figure | None:
    """Outlier ratio of every linear input, before and after smoothing."""
    known = [
        (kept.outlier_ratio, kept.smoothed_outlier_ratio)
        for block in run.blocks
        for kept in block.inputs
        if kept.smoothed_outlier_ratio
    ]
    if not known:
        return None
    before, after = zip(*known, strict=True)
    figure, axes = canvas(3.2)
    lowest, highest = min(*before, *after) * 0.9, max(*before, *after) * 1.1
    axes.plot([lowest, highest], [lowest, highest], color=MUTED, linewidth=1)
    axes.loglog(before, after, "o", color=FINAL, alpha=0.7)
    axes.set_xlim(lowest, highest)
    axes.set_ylim(lowest, highest)
    plain_log_ticks(axes, "both")
    axes.set_xlabel("largest channel / median channel, before smoothing")
    axes.set_ylabel("after smoothing")
    axes.set_title("below the line, smoothing flattened the input")
    return figure


def chosen_blocks(run: Run) -> list[Block]:
    """Up to three blocks whose insides are shown: the hardest, the one with the strongest outliers, the first."""
    looked_at = [block for block in run.blocks if block.inputs]
    if not looked_at:
        return []
    hardest = hardest_block(run) or looked_at[-1]
    outlying = max(looked_at, key=lambda block: max(kept.outlier_ratio for kept in block.inputs))
    chosen: list[Block] = []
    for block in (hardest, outlying, looked_at[0], looked_at[len(looked_at) // 2]):
        if block.inputs and block not in chosen:
            chosen.append(block)
    return chosen[:3]


def mapped_layer(block: Block, measurements: Measurements) -> str | None:
    """The layer of `block` whose input was kept as a heat map."""
    names = [kept.layers[0] for kept in block.inputs]
    return next((name for name in names if f"{block.index}|{name}|map_before" in measurements), None)


def activations(block: Block, layer: str, measurements: Measurements) -> Figure:
    """Magnitude by token and channel before and after smoothing, and the maximum per channel."""
    key = f"{block.index}|{layer}"
    maps = [measurements.get(f"{key}|map_{when}") for when in ("before", "after")]
    curves = [measurements.get(f"{key}|channels_{when}") for when in ("before", "after")]
    panels = 2 + (maps[1] is not None)
    figure, axes = canvas(1.45 * panels + 0.4, panels, height_ratios=[1] * (panels - 1) + [1.2])
    present = [values.float().numpy() for values in maps if values is not None]
    top = max(float(values.max()) for values in present)
    bottom = max(top / 300, 1e-6)
    norm = LogNorm(bottom, max(top, 1e-5))
    for place, (values, title) in enumerate(zip(present, ("before smoothing", "after smoothing"), strict=False)):
        image = axes[place].imshow(
            values.clip(min=bottom), aspect="auto", norm=norm, cmap="magma", origin="lower", interpolation="nearest"
        )
        axes[place].set_title(f"|input| {title}")
        axes[place].set_ylabel("token")
        axes[place].set_xticks([])
        axes[place].set_yticks([])
        axes[place].grid(False)
    bar = figure.colorbar(image, ax=axes[: panels - 1], pad=0.01, aspect=30)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("magnitude")
    for curve, label, colour in zip(curves, ("before", "after"), (PLAIN, FINAL), strict=True):
        if curve is not None:
            axes[-1].semilogy(
                np.linspace(0, 1, len(curve)),
                curve.float().clamp_min(1e-6).numpy(),
                color=colour,
                linewidth=0.9,
                label=label,
            )
    plain_log_ticks(axes[-1])
    axes[-1].set_xlim(0, 1)
    axes[-1].set_xticks([])
    axes[-1].set_xlabel("channel")
    axes[-1].set_ylabel("maximum")
    axes[-1].legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2, borderaxespad=0)
    return figure


def weights(block: Block, measurements: Measurements) -> Figure | None:
    """Histograms of a block's weights relative to their group's largest, and the range that clipping keeps."""
    layers = [
        key.split("|")[1] for key in measurements if key.startswith(f"{block.index}|") and key.endswith("|histogram")
    ]
    if not layers:
        return None
    shown = layers[:8]
    rows = (len(shown) + 1) // 2
    figure, axes = canvas(0.4 + 1.15 * rows, rows, 2, sharex=True, sharey=True, squeeze=False)
    flat = axes.flatten()
    for panel, layer in zip(flat, shown, strict=False):
        counts = measurements[f"{block.index}|{layer}|histogram"].float().numpy()
        edges = np.linspace(-1, 1, len(counts) + 1)
        panel.stairs(counts.clip(min=1e-6), edges, fill=True, color=START, alpha=0.75, baseline=1e-6)
        panel.set_yscale("log")
        panel.set_title(layer, fontsize=8)
        clip = measurements.get(f"{block.index}|{layer}|clip")
        if clip is not None:
            for side in clip.float().numpy():
                panel.axvspan(side[0], side[2], color=FINAL, alpha=0.18, linewidth=0)
                panel.axvline(side[1], color=FINAL, linewidth=1.2)
        panel.set_yticks([])
        panel.set_xticks([-1, 0, 1])
        panel.minorticks_off()
    for panel in flat[len(shown) :]:
        panel.set_visible(False)
    figure.supxlabel("weight / largest magnitude of its group", fontsize=9)
    return figure


def scales(run: Run, measurements: Measurements) -> Figure | None:
    """Learned smoothing scales against where they started; a point is a channel."""
    starts = [key for key in measurements if key.endswith("|scale_start")]
    kinds = list(dict.fromkeys(key.split("|")[1] for key in starts))
    if not kinds:
        return None
    last = max(int(key.split("|")[0]) for key in starts)
    rows = (len(kinds) + 1) // 2
    figure, axes = canvas(0.5 + 2.1 * rows, rows, 2, squeeze=False)
    flat = axes.flatten()
    for panel, kind in zip(flat, kinds, strict=False):
        for key in starts:
            block, name, _ = key.split("|")
            if name != kind:
                continue
            start = measurements[key].float().numpy()
            end = measurements[key.replace("scale_start", "scale_end")].float().numpy()
            colour = colormaps["viridis"](0.35 + 0.4 * int(block) / max(last, 1))  # seen on white and on black
            panel.loglog(start, end, ".", color=colour, markersize=2, alpha=0.6, rasterized=True)
        low, high = min(panel.get_xlim()[0], panel.get_ylim()[0]), max(panel.get_xlim()[1], panel.get_ylim()[1])
        panel.plot([low, high], [low, high], color=MUTED, linewidth=0.8)
        panel.set_xlim(low, high)
        panel.set_ylim(low, high)
        panel.set_title(_short(kind), fontsize=8)
        plain_log_ticks(panel, "both")
    for panel in flat[len(kinds) :]:
        panel.set_visible(False)
    figure.supxlabel("initial scale", fontsize=9)
    figure.supylabel("learned scale", fontsize=9)
    return figure


def _short(name: str) -> str:
    return name.replace("->", " → ").replace("*", " · ").replace("layernorm", "norm").replace("_", " ")


def windows(run: Run) -> Figure | None:
    """Change of perplexity of each window of text, sorted."""
    metric = next((metric for metric in run.metrics if metric.windows_before and metric.windows_after), None)
    if metric is None:
        return None
    before, after = np.exp(metric.windows_before), np.exp(metric.windows_after)
    order = np.argsort(after / before)
    figure, axes = canvas(2.8)
    changes = (after / before - 1)[order]
    axes.bar(range(len(changes)), changes, width=1.0, color=[FINAL if value < 0 else WARN for value in changes])
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("windows, in order of the change")
    axes.set_ylabel("change of perplexity")
    axes.set_title(metric.name)
    return figure


def window_pairs(run: Run) -> Figure | None:
    """Perplexity before and after over the text; of many windows, the mean of each of `MOST_BINS` parts."""
    metric = next((metric for metric in run.metrics if metric.windows_before and metric.windows_after), None)
    if metric is None:
        return None
    figure, axes = canvas(2.8)
    for values, label, colour, style in (
        (metric.windows_before, "before", PLAIN, "s-"),
        (metric.windows_after, "after", FINAL, "o-"),
    ):
        parts = np.array_split(np.asarray(values), min(len(values), MOST_BINS))
        ends = np.cumsum([len(part) for part in parts])
        means = [np.exp(part.mean()) for part in parts]
        axes.semilogy(ends, means, style, color=colour, label=label, markersize=2.5, linewidth=0.9)
    plain_log_ticks(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    binned = len(metric.windows_after) > MOST_BINS
    axes.set_xlabel(f"window of text{f' (mean of {MOST_BINS} parts)' if binned else ''}")
    axes.set_ylabel("perplexity")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def methods(run: Run) -> Figure | None:
    """The methods of a demo side by side, one panel per measured column."""
    if not run.compared:
        return None
    columns = list(run.compared[0].values)
    figure, axes = canvas(0.5 + (0.25 + 0.2 * len(run.compared)) * len(columns), len(columns), 1, squeeze=False)
    for panel, column in zip(axes.flatten(), columns, strict=True):
        names = [row.method for row in run.compared][::-1]
        values = [row.values.get(column, float("nan")) for row in run.compared][::-1]
        colours = [INHERITED if name == "full precision" else FINAL if name == run.method else START for name in names]
        panel.barh(names, values, color=colours, height=0.65)
        for row, value in enumerate(values):
            panel.text(value, row, f" {value:.2f}", va="center", fontsize=8)
        panel.set_title(column)
        panel.set_xlim(0, max(values) * 1.15)
        panel.grid(False)
        panel.set_xticks([])
        panel.spines["bottom"].set_visible(False)
    return figure


def compared_depth(runs: Sequence[tuple[str, Run]], kind: str, colours: Sequence[str]) -> Figure | None:
    """The same error of several runs along the depth."""
    figure, axes = canvas(2.9)
    for place, (name, run) in enumerate(runs):
        indices, errors = _blocks(run, kind)
        if indices:
            values = [error.relative for error in errors]
            axes.plot(indices, values, "o-", color=colours[place % len(colours)], label=name)
    if not axes.lines:
        return None
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block")
    axes.set_ylabel("relative output error")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure
