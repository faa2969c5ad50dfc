"""AutoRound's side of `benchmarks/peers.py`, by its own package: 8 samples a step, its own rates and precision."""

from typing import Any

from auto_round import AutoRound
from job import Job, run

# Steps per block of the package's recipes `auto-round` and `auto-round-best`.
ITERATIONS = {"default": 200, "best": 1000}


def numbers(job: Job) -> dict[str, Any]:
    """The number format in AutoRound's words: −1 is a whole row or a whole token."""
    if job.floats:
        return {"scheme": job.floats}
    told = job.numbers
    chosen = {"bits": told["wbits"], "group_size": told.get("group_size") or -1, "sym": told.get("symmetric", False)}
    if told["abits"] < 16:
        symmetric = told.get("activations_symmetric", False)
        chosen |= {"act_bits": told["abits"], "act_group_size": -1, "act_sym": symmetric, "act_dynamic": True}
    return {"scheme": "W4A16"} | chosen


def extended(job: Job) -> bool:
    """Whether to add the extension recommended beside `auto-round-best`, which knows symmetric grids only."""
    return job.method == "best" and bool(job.floats or job.numbers.get("symmetric", False))


def quantize(job: Job) -> tuple[Any, Any]:
    samples, (model, tokenizer) = job.samples(), job.load()
    rounder = AutoRound(
        model,
        tokenizer,
        dataset=samples,
        iters=job.iterations or ITERATIONS[job.method],
        nsamples=len(samples),
        seqlen=job.seqlen,
        batch_size=8,
        seed=job.seed,
        enable_alg_ext=extended(job),
        device_map="cpu",
        **numbers(job),
    )
    return rounder, rounder.quantize()[0]


def save(job: Job, result: tuple[Any, Any]) -> None:
    """In AutoRound's own format; GPTQ's packing holds every integer format without rounded activations."""
    packed = not job.floats and job.numbers["abits"] >= 16
    result[0].save_quantized(str(job.saved), format="auto_round:auto_gptq" if packed else "auto_round")


if __name__ == "__main__":
    run(quantize, lambda result: result[1], save)
