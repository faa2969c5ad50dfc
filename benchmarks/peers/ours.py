"""lrquant's side of `benchmarks/peers.py`. What is evaluated is the checkpoint, loaded back."""

from typing import Any

from job import Job, run

import lrquant
from lrquant import Recipe


def quantize(job: Job) -> Any:
    return lrquant.quantize(job.model, Recipe.parse(job.recipe), job.samples(), save_dir=job.saved, device="cpu")


if __name__ == "__main__":
    run(quantize, lambda quantized: quantized.model, lambda job, quantized: None)  # it is saved already
