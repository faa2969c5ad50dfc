"""llm-compressor's side of `benchmarks/peers.py`. Every method is the package's own, with its own defaults."""

from typing import Any

import torch
from job import Job, run
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache

if (
    not torch.cuda.is_available()
):  # AWQ pins memory for a GPU without asking whether there is one; no value depends on it
    IntermediatesCache.pin_memory = lambda *arguments: None


def scheme(job: Job) -> dict[str, Any]:
    """The number format as compressed-tensors describes it: all linears but the head."""
    chosen: dict[str, Any] = {"ignore": ["lm_head"]}
    if job.floats:
        return chosen | {"scheme": job.floats, "targets": ["Linear"]}
    numbers = job.numbers
    group = numbers.get("group_size")
    weights = {
        "num_bits": numbers["wbits"],
        "symmetric": numbers.get("symmetric", False),
        "strategy": "group" if group else "channel",
        "group_size": group,
    }
    inputs = {
        "num_bits": numbers["abits"],
        "symmetric": numbers.get("activations_symmetric", False),
        "strategy": "token",
        "dynamic": True,
    }
    linears = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if numbers["abits"] < 16 else None,
    }
    return chosen | {"config_groups": {"linears": linears}}


# GPTQ with activation order and 1 % of dampening, AWQ with its grid of 20 and duo scaling: the defaults. SmoothQuant's
# strength and SpinQuant's rotations are those of the package's examples.
METHODS = {
    "rtn": lambda rounding: [QuantizationModifier(**rounding)],
    "gptq": lambda rounding: [GPTQModifier(**rounding)],
    "smoothquant+gptq": lambda rounding: [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(**rounding)],
    "awq": lambda rounding: [AWQModifier(), QuantizationModifier(**rounding)],
    "spinquant+gptq": lambda rounding: [
        SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard"),
        GPTQModifier(**rounding),
    ],
}


def quantize(job: Job) -> tuple[Any, Any]:
    model, tokenizer = job.load()
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for sample in job.samples() for row in sample]
    quantized = oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=torch.utils.data.DataLoader(rows, batch_size=1),
        recipe=METHODS[job.method](scheme(job)),
        num_calibration_samples=len(rows),
        max_seq_length=job.seqlen,
    )
    return quantized, tokenizer


def save(job: Job, result: tuple[Any, Any]) -> None:
    for part in result:
        part.save_pretrained(job.saved)


if __name__ == "__main__":
    run(quantize, lambda result: result[0], save)
