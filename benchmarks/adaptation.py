"""What test-time adaptation is worth: `python benchmarks/adaptation.py`, offline, on the bundled model.

Calibrate on source code, test on documentation: the same held-out text is measured with a model that never saw
its kind, with that model adapted to the text itself, and with a model that was calibrated on the text's domain
(its train part). Adapting to one half of the text and measuring on the other half is beside it: there, nothing
of what is measured was seen.
"""

import statistics
import tempfile
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import lrquant
from lrquant.calibration import evaluation_ids, read_text
from lrquant.loading.pretrained import load_tokenizer

FORMATS: dict[str, dict[str, Any]] = {
    "W4A4": {"wbits": 4, "abits": 4},
    "W3A16": {"wbits": 3, "abits": 16},
    "W2A16 g64": {"wbits": 2, "abits": 16, "group_size": 64},
}


def halves(source: str, folder: Path) -> tuple[str, str]:
    """Every other document of the held-out part, as two text files."""
    documents = read_text(source, train=False)
    paths = []
    for name, part in (("first", documents[::2]), ("second", documents[1::2])):
        paths.append(folder / f"{name}.txt")
        paths[-1].write_text("\n\n".join(part))
    return str(paths[0]), str(paths[1])


def main(
    model: str = "zoo:llama",
    calib: str = "zoo:pycode",
    test: str = "zoo:pydoc",
    method: str = "lrquant",
    formats: Annotated[str, typer.Option(help="Only these, as W4A4,W3A16.")] = ",".join(FORMATS),
    blocks: Annotated[str, typer.Option(help="Settings of --blocks, separated by semicolons.")] = "last;all",
    starts: Annotated[str, typer.Option(help="Where smoothing starts, as neutral,log.")] = "neutral,log",
    nsamples: int = 32,
    seqlen: int = 128,
    epochs: int = 5,
    batch_size: int = 4,
    windows: Annotated[int, typer.Option(help="Adapt to and measure only so many windows.")] = 64,
    seeds: int = 1,
) -> None:
    """Print test-time adaptation's results as a markdown table."""
    err = Console(stderr=True)
    print(f"| perplexity on held-out {test} | whole text | its second half |")
    print("|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seen, unseen = halves(test, folder)

        tokenizer = load_tokenizer(model)
        tokens = {text: evaluation_ids(tokenizer, text)[: windows * seqlen] for text in (test, seen)}
        samples = {text: list(ids[: len(ids) // seqlen * seqlen].view(-1, 1, seqlen)) for text, ids in tokens.items()}

        def measure(path: Any) -> list[float]:
            found = lrquant.evaluate(str(path), [test, unseen], seqlen, limit_windows=windows)
            return [result.value for result in found.values()]

        def row(name: str, pairs: list[list[float]]) -> None:
            columns = [spread([pair[column] for pair in pairs]) for column in (0, 1)]
            print(f"| {name} | {' | '.join(columns)} |", flush=True)

        row("full precision", [measure(model)])
        for format_name in formats.split(","):
            found: dict[str, list[list[float]]] = {}
            for seed in range(seeds):
                settings = {"nsamples": nsamples, "seqlen": seqlen, "epochs": epochs, "batch_size": batch_size}
                recipe = lrquant.Recipe.preset(method, **FORMATS[format_name], **settings, seed=seed)
                here = folder / format_name / str(seed)
                for text, name in ((calib, "calibrated"), (test, "domain")):
                    err.print(f"{format_name}, seed {seed}: calibrating on {text}")
                    lrquant.quantize(model, recipe, text, save_dir=here / name)
                source = here / "calibrated"
                found.setdefault(f"{format_name}, calibrated on {calib}", []).append(measure(source))
                for chosen, start in product(blocks.split(";"), starts.split(",")):
                    err.print(f"{format_name}, seed {seed}: adapting blocks {chosen} from a {start} start")
                    values = []
                    for data, column in ((test, 0), (seen, 1)):
                        out = here / f"{chosen}-{start}-{column}"
                        learning = {"epochs": epochs, "init": start}
                        lrquant.adapt(source, model, samples[data], save_dir=out, blocks=chosen, **learning)
                        values.append(measure(out)[column])
                    found.setdefault(f"… blocks adapted: {chosen}, {start} start", []).append(values)
                found.setdefault(f"{format_name}, calibrated on {test}'s train part", []).append(
                    measure(here / "domain")
                )
            for name, pairs in found.items():
                row(name, pairs)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    typer.run(main)
