"""What one training step of a block takes above its own weights and the activation store, at given shapes.

    python benchmarks/step_memory.py --hidden 2048 --intermediate 5504 --tokens 512

Allocations are followed by PyTorch's own counters: the accelerator's, or on a CPU the profiler's record of every
allocation and release during one step (forward, backward, AdamW).
"""

from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from lrquant import Recipe
from lrquant.architectures import family_of
from lrquant.calibration import capture
from lrquant.formats.activations import quantized_activations, route_attention
from lrquant.losses import mse, nlc
from lrquant.reconstruction.engine import _Run, enabled_equivalences, linear_input_args
from lrquant.reconstruction.parameters import BlockParameters, initial_clipping, initial_smoothing


def peak_of(profiler: profile) -> int:
    """Largest sum of live bytes, counted from the profile's beginning."""
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def main(
    hidden: int = 2048,
    intermediate: int = 5504,
    heads: int = 16,
    kv_heads: int = 16,
    tokens: int = 512,
    batch: int = 1,
    wbits: int = 4,
    abits: int = 4,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
) -> None:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=128,
        max_position_embeddings=tokens,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    recipe = Recipe.preset("lrquant", wbits=wbits, abits=abits)
    family = family_of(model)
    route_attention(model)
    block = model.model.layers[0]
    samples = [{"input_ids": torch.randint(0, 128, (1, tokens))} for _ in range(batch)]
    inputs = capture(model, [block], samples)
    stream = [hidden_states.clone() for hidden_states in inputs.hidden]
    run = _Run(block, 0, inputs, torch.device("cpu"), batch)
    statistics, flat = run.advance_full_precision(inputs.hidden)
    fixed = BlockParameters.of(
        block, enabled_equivalences(family.equivalences(config), recipe), recipe.scheme, torch.bfloat16
    )
    start = initial_smoothing(fixed, statistics, recipe.init, recipe.alpha, ()) | initial_clipping(fixed)
    learnables = {name: tensor.requires_grad_() for name, tensor in start.items()}
    optimizer = torch.optim.AdamW(learnables.values(), lr=1e-3)
    forward = run.forward_function(fixed, stream, [inputs.hidden])

    def step() -> None:
        output, (target,) = forward(learnables, range(batch))
        (mse(output, target) + nlc(output, target)).backward()
        optimizer.step()
        optimizer.zero_grad()

    with quantized_activations(
        block, linear_input_args(block, recipe.scheme.inputs, recipe, flat), recipe.scheme.attention
    ):
        step()  # the optimiser's state exists from here on
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    weights = sum(tensor.numel() for tensor in fixed.tensors.values()) * 4
    peak = peak_of(profiler)
    print(
        f"hidden {hidden}, intermediate {intermediate}, {batch} x {tokens} tokens, {recipe.format_name}, {dtype}: "
        f"a step peaks at {peak / 1e6:.0f} MB above the block ({weights / 1e6:.0f} MB in float32): "
        f"{peak / weights:.2f} blocks, {peak / (batch * tokens) / 1e3:.0f} kB per token"
    )


if __name__ == "__main__":
    typer.run(main)
