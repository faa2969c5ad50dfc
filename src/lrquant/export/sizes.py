"""What a checkpoint takes on disk."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk against bf16, and what a quantized weight costs with its scales and zero points."""

    checkpoint_bytes: int
    bf16_bytes: int
    bits_per_weight: float  # over the quantized linears

    @property
    def ratio(self) -> float:
        """How many times smaller than bf16."""
        return self.bf16_bytes / self.checkpoint_bytes
