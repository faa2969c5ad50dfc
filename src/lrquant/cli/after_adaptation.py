"""The effect of adapting a result to each text (`--tta`), measured on temporary copies."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrquant.cli import console

if TYPE_CHECKING:
    from lrquant.evaluation import Perplexity
    from lrquant.recipe import Recipe


def perplexity_after_adaptation(
    quantized: Path,
    reference: str,
    texts: Sequence[str],
    recipe: "Recipe",
    limit_windows: int | None,
    device: str,
) -> dict[str, "Perplexity"]:
    """Perplexity on each of `texts` of a temporary copy of `quantized` that was adapted to it."""
    from lrquant.entrypoints.adapt import adapt
    from lrquant.entrypoints.evaluate import evaluate

    seqlen, bos = recipe.seqlen, recipe.bos
    measured: dict[str, Perplexity] = {}
    for text in texts:
        with tempfile.TemporaryDirectory() as folder, console.watching(f"adapting to {text}") as progress:
            path = Path(folder) / "adapted"
            adapt(quantized, reference, text, save_dir=path, seqlen=seqlen, device=device, callback=progress)
            measured |= evaluate(str(path), [text], seqlen, limit_windows=limit_windows, device=device, bos=bos)
    return measured
