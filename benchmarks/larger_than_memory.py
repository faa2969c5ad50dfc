"""Peak memory against the size of the model: random Llamas on disk, quantized by processes that may use 2 GB.

    python benchmarks/larger_than_memory.py sizes --folder /var/tmp/models      # up to 3.3 GB; a figure and a table
    python benchmarks/larger_than_memory.py stores --folder /var/tmp/models     # where hidden states wait

Models are written block by block and differ in their number of blocks alone. The limit is a control group's where this
process may make one: then it counts everything, the page cache too, and going over it ends the process. Else it is
RLIMIT_DATA, which counts what is allocated. Peak memory is the process's resident set at its largest.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from transformers import LlamaConfig

from lrquant import Recipe, quantize
from lrquant.runtime.memory import PeakMemory
from lrquant.zoo import zoo_model_path

SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4}
GROUPS = Path("/sys/fs/cgroup")
app = typer.Typer()


def write_llama(folder: Path, blocks: int) -> int:
    """A random Llama of this many blocks, one file each; returns the bytes of its tensors."""
    tokenizer = zoo_model_path("llama")
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer) / name, folder)
    vocabulary = json.loads((Path(tokenizer) / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        **SHAPE, num_hidden_layers=blocks, vocab_size=vocabulary, max_position_embeddings=2048, dtype="bfloat16"
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    hidden, inner = config.hidden_size, config.intermediate_size
    narrow = hidden // config.num_attention_heads * config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    def block(index: int) -> dict[str, torch.Tensor]:
        found = {f"model.layers.{index}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{index}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        return found

    total, places = 0, {}
    for index in range(blocks + 1):
        outside = {
            "model.embed_tokens.weight": random(vocabulary, hidden),
            "lm_head.weight": random(vocabulary, hidden),
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        }
        tensors = block(index) if index < blocks else outside
        file = f"model-{index + 1:05}-of-{blocks + 1:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return total


@contextmanager
def control_group(limit: int) -> Iterator[Path | None]:
    """A control group with `limit` bytes of memory; None: this process may make none."""
    version2 = (GROUPS / "cgroup.controllers").is_file()
    group = (GROUPS if version2 else GROUPS / "memory") / f"lrquant-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.max" if version2 else "memory.limit_in_bytes")).write_text(str(limit))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def limited(limit: int, *arguments: object) -> dict[str, Any]:
    """This script's `work`, in a process that may use `limit` bytes."""
    command = [sys.executable, __file__, "work", *map(str, arguments)]
    with control_group(limit) as group:

        def before() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))
            else:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=before)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))}: ended with {done.returncode}")
    return json.loads(done.stdout) | {"limited by": "control group" if group is not None else "RLIMIT_DATA"}


@app.command(hidden=True)
def work(
    model: Path,
    save_dir: Path,
    method: str,
    samples: int,
    tokens: int,
    activations: str,
    report: Annotated[bool, typer.Argument()],
) -> None:
    memory, began = PeakMemory(), time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4000, (1, tokens), generator=generator) for _ in range(samples)]
    epochs = {"epochs": 1} if method == "lrquant" else {}
    recipe = Recipe.preset(method, wbits=4, abits=4, batch_size=4, kernels="eager", **epochs)
    how: Any = {"device": "cpu", "activations": activations, "report": report}
    done = quantize(str(model), recipe, ids, save_dir=save_dir, **how)
    seconds = time.perf_counter() - began
    print(json.dumps({"peak": memory.peak_bytes(), "seconds": seconds, "written": done.sizes.checkpoint_bytes}))


Folder = Annotated[Path, typer.Option(help="Where models are written for a while; not in memory.")]
Limit = Annotated[float, typer.Option(help="GB that a process may use.")]


@app.command()
def sizes(
    folder: Folder,
    blocks: Annotated[list[int], typer.Option()] = [4, 12, 24, 36],  # noqa: B006
    limit: Limit = 2.0,
    samples: int = 4,
    tokens: int = 64,
    report: Annotated[bool, typer.Option(help="With the report that the command line makes.")] = False,
    results: Annotated[Path, typer.Option(help="Rows are added to this file.")] = Path("larger_than_memory.json"),
    figure: Path | None = None,
) -> None:
    """LRQuant W4A4, one epoch, of models of several sizes."""
    rows = json.loads(results.read_text()) if results.is_file() else []
    for count in blocks:
        model, out = folder / f"llama-{count}", folder / f"llama-{count}-w4a4"
        for path in (model, out):
            shutil.rmtree(path, ignore_errors=True)
        size = write_llama(model, count)
        found = limited(int(limit * 1e9), model, out, "lrquant", samples, tokens, "auto", report)
        row = {"blocks": count, "model": size, **found}
        rows.append(row)
        results.write_text(json.dumps(rows, indent=1))
        print(f"| {count} | {size / 1e9:.2f} GB | {row['peak'] / 1e9:.2f} GB | {row['seconds']:.0f} s |", flush=True)
        for path in (model, out):
            shutil.rmtree(path)
    if figure is not None:
        draw(rows, limit, figure)


def draw(rows: list[dict[str, Any]], limit: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lrquant"
    from matplotlib import pyplot

    rows = sorted(rows, key=lambda row: row["model"])
    shown, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    models = [row["model"] / 1e9 for row in rows]
    axes.plot(models, models, color="#999999", linestyle=":", label="the model itself")
    axes.axhline(limit, color="#c44e52", linestyle="--", label="what the process may use")
    axes.plot(models, [row["peak"] / 1e9 for row in rows], marker="o", color="#4c72b0", label="peak memory")
    axes.set(xlabel="model on disk, GB", ylabel="GB", ylim=(0, None), xlim=(0, None))
    axes.legend(frameon=False)
    shown.savefig(path, metadata={"Date": None})


@app.command()
def stores(folder: Folder, limit: Limit = 2.0, blocks: int = 4, samples: int = 32, tokens: int = 512) -> None:
    """SmoothQuant W4A4 with hidden states in memory and on disk."""
    model = folder / "llama-stores"
    shutil.rmtree(model, ignore_errors=True)
    write_llama(model, blocks)
    states = samples * tokens * SHAPE["hidden_size"] * 4 * 2
    print(f"{samples} samples of {tokens} tokens: {states / 1e6:.0f} MB of hidden states")
    for where in ("device", "host", "disk"):
        out = folder / f"out-{where}"
        shutil.rmtree(out, ignore_errors=True)
        row = limited(int(limit * 1e9), model, out, "smoothquant", samples, tokens, where, False)
        print(f"| {where} | {row['peak'] / 1e6:.0f} MB | {row['seconds']:.0f} s |", flush=True)
        shutil.rmtree(out)
    shutil.rmtree(model)


if __name__ == "__main__":
    app()
