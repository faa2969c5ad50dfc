"""What each part of a method is worth: `python benchmarks/ablation.py`, offline, on the bundled model.

    python benchmarks/ablation.py                                      the parts of LRQuant+
    python benchmarks/ablation.py --table max --formats W4A4           the parts of lrquant-max
    python benchmarks/ablation.py --table all --formats W4A4           everything there is, one part removed at a time
    python benchmarks/ablation.py --table all --outliers 30            … behind norms with outlier channels
    python benchmarks/ablation.py --table all --concentrate            … with hidden states in a few channels

Every row is a recipe, every column a number format; a cell is the perplexity's mean and standard deviation over
seeds, which decide the calibration samples and their order. The two stress models compute what the original does.
"""

import copy
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import lrquant
from lrquant.architectures import family_of
from lrquant.calibration.text import calibration_samples, evaluation_ids
from lrquant.evaluation import perplexity
from lrquant.loading.original import Original
from lrquant.loading.pretrained import load_model, load_tokenizer
from lrquant.passes.rotation import rotate_stream
from lrquant.zoo.scripts.outliers import grow_outliers

Row = dict[str, Any]  # what a row changes in the preset `lrquant`, or in the one it names


def on(*parts: str) -> Row:
    return dict.fromkeys(parts, True)


PLUS = on("two_branch", "dynamic_loss", "rotation_vectors")
ALL: Row = PLUS | {"rounding": "learned", "rotate": ("stream", "values", "down")}
MAX: Row = {"method": "lrquant-max"}
TABLES: dict[str, dict[str, Row]] = {
    "lrquant+": {
        "LRQuant": {},
        "LRQuant+ (all three)": PLUS,
        "+ two branches": on("two_branch"),
        "+ dynamic loss": on("dynamic_loss"),
        "+ rotation": on("rotation_vectors"),
        "LRQuant+ without two branches": on("dynamic_loss", "rotation_vectors"),
        "LRQuant+ without dynamic loss": on("two_branch", "rotation_vectors"),
        "LRQuant+ without rotation": on("two_branch", "dynamic_loss"),
    },
    "max": {
        "lrquant-max": MAX,
        "… without smoothing": MAX | {"let": False},
        "… without clipping": MAX | {"lwc": False},
        "… without learned rounding": MAX | {"rounding": "nearest"},
        "… without two branches and dynamic loss": MAX | {"two_branch": False, "dynamic_loss": False},
        "… with MSE + NLC, dynamically weighted": MAX | {"loss": "mse+nlc", "dynamic_loss": True},
        "… without rotation vectors": MAX | {"rotation_vectors": False},
        "… without tuning as a whole": MAX | {"tuning_epochs": 0},
        "… with two branches, dynamic loss and rotation vectors": MAX | PLUS,
        "… with orthogonal rotation of stream and values": MAX | {"rotate": ("stream", "values")},
        "… with orthogonal rotation of values": MAX | {"rotate": ("values",)},
    },
    "all": {
        "rounding to nearest": {"method": "rtn"},
        "… behind orthogonal rotation": {"method": "rtn", "rotate": ALL["rotate"]},
        "LRQuant": {},
        "LRQuant+": PLUS,
        "everything": ALL,
        "… without smoothing": ALL | {"let": False},
        "… with a shift": ALL | {"shift": "on"},
        "… without clipping": ALL | {"lwc": False},
        "… without two branches and dynamic loss": ALL | {"two_branch": False, "dynamic_loss": False},
        "… without rotation vectors": ALL | {"rotation_vectors": False},
        "… without learned rounding": ALL | {"rounding": "nearest"},
        "… without the transform at run time": ALL | {"rotate": ("stream", "values")},
        "… without orthogonal rotation": ALL | {"rotate": ()},
    },
}
FORMATS: dict[str, dict[str, Any]] = {
    "W4A4": {"wbits": 4, "abits": 4},
    "W3A16": {"wbits": 3, "abits": 16},
    "W2A16 g64": {"wbits": 2, "abits": 16, "group_size": 64},
}


def main(
    model: str = "zoo:llama",
    calib: str = "zoo:pydoc",
    eval_ppl: str = "zoo:pydoc",
    seeds: int = 5,
    nsamples: int = 32,
    seqlen: int = 256,
    epochs: int = 5,
    batch_size: int = 4,
    windows: int = 64,
    table: Annotated[str, typer.Option(help=f"Which rows: {', '.join(TABLES)}.")] = "lrquant+",
    outliers: Annotated[float, typer.Option(help="First grow channels behind every norm by this factor.")] = 1.0,
    concentrate: Annotated[bool, typer.Option(help="First turn the hidden states to their principal axes.")] = False,
    formats: Annotated[str, typer.Option(help="Only these formats, separated by commas.")] = ",".join(FORMATS),
    rows: Annotated[str, typer.Option(help="Only these rows, by number, as 0,1.")] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Keep every single result here; results already there are not redone.")
    ] = None,
) -> None:
    """Print an ablation as a markdown table."""
    err = Console(stderr=True)
    tokenizer, original = load_tokenizer(model), load_model(model, torch.float32)
    test = evaluation_ids(tokenizer, eval_ppl)
    calibration = [calibration_samples(tokenizer, calib, nsamples, seqlen, seed) for seed in range(seeds)]
    if concentrate:
        concentrate_stream(original, calibration[0])
    if outliers != 1:
        grow_outliers(original, outliers)
    err.print(f"largest channel of a block's input, times the mean of all: {peak(original, calibration[0]):.1f}")
    recipes = TABLES[table]
    names = [name for index, name in enumerate(recipes) if not rows or str(index) in rows.split(",")]
    if unknown := set(formats.split(",")) - set(FORMATS):
        raise typer.BadParameter(f"unknown formats {', '.join(sorted(unknown))}: there are {', '.join(FORMATS)}")
    columns = {name: FORMATS[name] for name in formats.split(",")}
    settings = [model, calib, eval_ppl, nsamples, seqlen, epochs, batch_size, windows, table, outliers, concentrate]
    kept = (
        json.loads(json_file.read_text()) if json_file and json_file.is_file() else {"settings": settings, "rows": {}}
    )
    if kept["settings"] != settings:
        raise typer.BadParameter(f"{json_file} holds results of other settings, {kept['settings']}")
    results: dict[str, dict[str, list[float]]] = {row: kept["rows"].get(row, {}) for row in names}
    total = sum(seeds - len(results[row].get(name, [])) for row in names for name in columns)
    done, began = 0, time.perf_counter()
    full = perplexity(original, test, seqlen, windows).value
    for seed in range(seeds):
        for row in names:
            for name, bits in columns.items():
                values = results[row].setdefault(name, [])
                if len(values) > seed:
                    continue
                recipe = lrquant.Recipe.preset(
                    **{"method": "lrquant", **bits, **recipes[row]}, seed=seed, seqlen=seqlen
                )
                if recipe.learns:
                    recipe = recipe.changed(epochs=epochs, batch_size=batch_size)
                quantized = lrquant.quantize(copy.deepcopy(original), recipe, calibration[seed], tokenizer=tokenizer)
                values.append(perplexity(quantized.model, test, seqlen, windows).value)
                done += 1
                left = (time.perf_counter() - began) * (total / done - 1)
                err.print(f"{done}/{total} seed {seed} {row}, {name}: {values[-1]:.3f}, {left / 60:.0f} min left")
                if json_file:
                    merged = kept["rows"] | results
                    json_file.write_text(
                        json.dumps({"settings": settings, "full": full, "rows": merged}, indent=1) + "\n"
                    )
    print(f"| perplexity on {eval_ppl}, mean ± deviation of {seeds} seeds | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    print(f"| full precision | {' | '.join([f'{full:.3f}'] * len(columns))} |")
    for row, cells in results.items():
        print(f"| {row} | {' | '.join(cell(cells[name]) for name in columns)} |")


@torch.no_grad()
def peak(model: Any, samples: list[torch.Tensor]) -> float:
    """The largest channel's root mean square over the mean of all channels', of the last block's input."""
    hidden = block_inputs(model, samples)[-1]
    spread = (hidden**2).mean(0).sqrt()
    return float(spread.max() / spread.mean())


def block_inputs(model: Any, samples: list[torch.Tensor]) -> list[torch.Tensor]:
    """What every block receives, (tokens of all samples, hidden)."""
    seen: dict[int, list[torch.Tensor]] = {}
    (stage,) = family_of(model).stages(model)
    handles = [
        block.register_forward_pre_hook(lambda _, inputs, index=index: seen.setdefault(index, []).append(inputs[0][0]))
        for index, block in enumerate(stage.blocks(model))
    ]
    for ids in samples:
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for _, parts in sorted(seen.items())]


@torch.no_grad()
def concentrate_stream(model: Any, samples: list[torch.Tensor]) -> None:
    """Turn the hidden states to the principal axes of what blocks receive, so that a few channels stand out.

    The opposite of what a Hadamard matrix does, and by the same means.
    """
    (stage,) = family_of(model).stages(model)
    rows = torch.cat([hidden / hidden.norm(dim=-1, keepdim=True) for hidden in block_inputs(model, samples)]).double()
    axes = torch.linalg.eigh(rows.T @ rows).eigenvectors
    rotate_stream(Original.in_memory(model, lrquant.Recipe()), stage, axes)


def cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    typer.run(main)
