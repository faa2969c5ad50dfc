"""Notes on the experts of a result: how they are stored, and which of them saw few calibration tokens."""

from collections.abc import Sequence

from lrquant.reconstruction.result import Reconstruction

FEW = 16  # tokens: less than one for each value of a four-bit grid
MOST_NAMES = 3


def expert_notes(result: Reconstruction) -> list[str]:
    """A sentence for each thing worth knowing."""
    notes = []
    if result.own_layout:
        notes.append(
            "The model's code fuses or transposes some linears, and plain transformers cannot unpack this format for "
            "them: the checkpoint loads only after `import lrquant`. In most families, experts with symmetric "
            "weight-only integers load without it."
        )
    seen = {
        f"{path}.{expert}": tokens
        for path, record in zip(result.block_paths, result.records, strict=False)
        for expert, tokens in record.expert_tokens.items()
    }
    none = [expert for expert, tokens in seen.items() if tokens == 0]
    few = [expert for expert, tokens in seen.items() if 0 < tokens < FEW]
    remedy = "they were calibrated on all tokens" if result.recipe.all_experts else "use more samples, or --all-experts"
    for experts, what in ((none, "no calibration token"), (few, f"fewer than {FEW} calibration tokens")):
        if experts:
            notes.append(f"{len(experts)} of {len(seen)} experts were sent {what} ({_shortened(experts)}); {remedy}.")
    return notes


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")
