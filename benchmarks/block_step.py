"""Time and memory of learning one Llama block, beside a plain implementation of the same mathematics.

    python benchmarks/block_step.py                                        # the bundled model's shapes
    python benchmarks/block_step.py --shape llama-7b --tokens 2048 --whole 2560   # on a GPU

Every row is the same block, the same samples and the same learnables. `plain` is what the tests check the engine by
(tests/reference.py): a chain of differentiable operations in float32, every linear rounding its own input. The others
are the engine's kernels, with matrix products in float32 or bfloat16. `--whole STEPS` also learns a whole block with
that many steps, through the engine's own loop.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from lrquant import Recipe
from lrquant.architectures import family_of
from lrquant.calibration import capture
from lrquant.calibration.activation_cache import ActivationStore
from lrquant.formats import Factors, NumberFormat, kernels
from lrquant.formats import activation_quant as activations
from lrquant.formats.activation_quant import quantized_activations, route_attention
from lrquant.losses import objective, terms
from lrquant.reconstruction import block_parameters as parameters
from lrquant.reconstruction.block_forward import BlockForward
from lrquant.reconstruction.block_optimizer import Batches, learn
from lrquant.reconstruction.block_preparation import enabled_equivalences, linear_input_args
from lrquant.reconstruction.compiled_block import CompiledBlocks
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables import Start, first_values
from lrquant.runtime.execution import has_triton

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import reference

SHAPES = {  # hidden, intermediate, heads, heads of keys and values
    "zoo": (256, 640, 8, 4),
    "small": (1024, 2816, 16, 16),
    "medium": (2048, 5504, 16, 16),
    "llama-7b": (4096, 11008, 32, 32),
    "llama-3-8b": (4096, 14336, 32, 8),
}


def plain_activation(x: Tensor, format: NumberFormat, *_: Any) -> Tensor:
    return reference.fake_quantize_weight(x, format.bits, format.symmetric, None, scale_dtype=x.dtype)


def plain_weight(
    weight: Tensor, format: NumberFormat, factors: Factors, scale_dtype: torch.dtype, *_: Any, **__: Any
) -> Tensor:
    return reference.fake_quantize_weight(
        weight, format.bits, format.symmetric, format.group_size, *factors, scale_dtype=scale_dtype
    )


@contextmanager
def plain() -> Iterator[None]:
    """Within, the engine computes as plainly as can be."""
    with (
        patch.object(activations, "fake_quantize", plain_activation),
        patch.object(activations._Latest, "quantized", lambda self, x, args, *_: plain_activation(x, args)),
        patch.object(parameters, "fake_quantize_weight", plain_weight),
    ):
        yield


def peak_of(profiler: profile) -> int:
    """Largest sum of live bytes, counted from the profile's beginning."""
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def peak_memory(step: Callable[[], None], device: torch.device) -> int:
    """Bytes that `step` takes above what is there when it begins."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return peak_of(profiler)


def seconds_of(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median time of a step."""
    taken = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceiling(device: torch.device, dtype: torch.dtype, largest: int) -> float:
    """FLOP/s of a square matrix product, the most that this machine reaches.

    Sizes double up to `largest`, or until a product takes a twentieth of a second: some processors emulate bfloat16.
    """
    size, reached = 128, 0.0
    while size < largest:
        size *= 2
        taken = seconds_of(product_of(*torch.randn(2, size, size, device=device, dtype=dtype)), device, 5)
        reached = max(reached, 2 * size**3 / taken)
        if taken > 0.05:
            break
    return reached


def product_of(a: Tensor, b: Tensor) -> Callable[[], None]:
    """A step that multiplies `a` and `b` and takes no memory for it."""
    out = a @ b

    def step() -> None:
        torch.mm(a, b, out=out)

    return step


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}, or HIDDEN,INTERMEDIATE,HEADS,KV.")] = "zoo",
    tokens: int = 256,
    batch: int = 4,
    method: str = "lrquant",
    wbits: int = 4,
    abits: int = 4,
    group_size: int | None = None,
    repeats: int = 10,
    whole: Annotated[int, typer.Option(help="Also learn a block with about this many steps.")] = 0,
    device_name: Annotated[str, typer.Option("--device")] = "cuda" if torch.cuda.is_available() else "cpu",
    rows: Annotated[str, typer.Option(help="Only these rows, separated by semicolons.")] = "",
) -> None:
    hidden, intermediate, heads, kv_heads = SHAPES[shape] if shape in SHAPES else map(int, shape.split(","))
    device = torch.device(device_name)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=128,
        max_position_embeddings=tokens,
    )
    model = LlamaForCausalLM(config).eval()
    if device.type == "cuda":
        model = model.to(torch.bfloat16)
    family = family_of(model)
    route_attention(model)
    block = model.model.layers[0]
    samples = [{"input_ids": torch.randint(0, 128, (1, tokens)), "use_cache": False} for _ in range(4 * batch)]
    inputs = capture(model, [block], samples)
    block.to(device)
    recipe = Recipe.preset(method, wbits=wbits, abits=abits, group_size=group_size, batch_size=batch)
    inputs.hidden = [each.to(device) for each in inputs.hidden]
    stream = [each.clone() for each in inputs.hidden]
    run = BlockForward(block, 0, inputs, device, batch)
    store = ActivationStore("device", device, Path(), len(samples), 3)
    own = run.outputs(stream, store) if recipe.two_branch else None
    gathered, flat = run.advance_full_precision(inputs.hidden)
    targets = [inputs.hidden] if own is None else [inputs.hidden, own]
    fixed = BlockParameters.of(
        block, enabled_equivalences(family.equivalences(config), recipe, ""), recipe.scheme, torch.bfloat16
    )
    start = first_values(fixed, Start(recipe, statistics=gathered))
    weights = sum(tensor.numel() for tensor in fixed.tensors.values())
    flops = 6 * weights * tokens * batch
    most = ceiling(device, torch.bfloat16, 8192 if device.type == "cuda" else 2048)

    choices: dict[str, tuple[str, str]] = {"plain": ("eager", "float32")}
    fused = ["triton"] if device.type == "cuda" and has_triton() else []
    for name in ["eager", "compiled", *fused]:
        for products in ("float32", "bfloat16"):
            choices[f"{name}, {products}"] = (name, products)
    if rows:
        choices = {name: choices[name.strip()] for name in rows.split(";")}
    name_of_device = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(
        f"\n{shape}: hidden {hidden}, intermediate {intermediate}, {heads}/{kv_heads} heads, {batch} x {tokens} tokens "
        f"a step, {method} {recipe.format_name}, {name_of_device}, torch {torch.__version__}; {weights / 1e6:.1f} M "
        f"weights; bfloat16 products reach {most / 1e12:.2f} TFLOP/s\n"
    )
    columns = (
        "| implementation | ms per step | speedup | TFLOP/s | of the ceiling | MB above the block | s to compile |"
    )
    print(columns + (" s a block |" if whole else ""), flush=True)
    print("|---" * (columns.count("|") - 1 + bool(whole)) + "|")
    reference_time = None
    for name, (kernel, products) in choices.items():
        chosen = recipe.changed(products=products, kernels=kernel)
        learnables = {key: tensor.clone().requires_grad_() for key, tensor in start.items()}
        optimizer = torch.optim.AdamW(learnables.values(), lr=1e-4, fused=name != "plain")

        with (
            quantized_activations(block, linear_input_args(block, recipe.scheme, flat), recipe.scheme.attention_inputs),
            kernels.using(kernel),
            plain() if name == "plain" else kernels.using(kernel),
        ):
            graph = CompiledBlocks(chosen, device).of(block, fixed)
            forward = run.forward_function(fixed, stream, targets, recipe=chosen, graph=graph)

            def step(forward: Any = forward, learnables: Any = learnables, optimizer: Any = optimizer) -> None:
                parts = [part for part in terms(forward(learnables, range(batch))) if part is not None]
                optimizer.zero_grad()
                objective(parts, recipe.loss).backward()
                optimizer.step()

            began = time.perf_counter()
            for _ in range(3):
                step()
            first_steps = time.perf_counter() - began
            peak = peak_memory(step, device)
            taken = seconds_of(step, device, repeats)
            reference_time = reference_time or taken
            cells = [
                name,
                f"{taken * 1e3:.1f}",
                f"{reference_time / taken:.1f}",
                f"{flops / taken / 1e12:.3f}",
                f"{100 * flops / taken / most:.0f} %",
                f"{peak / 1e6:.0f}",
                f"{max(0.0, first_steps - 3 * taken):.0f}",
            ]
            if whole:
                epochs = max(1, whole * batch // len(samples))
                began = time.perf_counter()
                learned = chosen.changed(epochs=epochs)
                learn(forward, start, Batches(len(samples), batch), recipe=learned, seed=0, on_epoch=lambda *_: None)
                synchronize(device)
                cells.append(f"{time.perf_counter() - began:.1f}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
