"""The size of a checkpoint on disk."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk compared with the original, and bits per quantized weight including scales and zero points."""

    checkpoint_bytes: int
    bf16_bytes: int
    bits_per_weight: float  # over the quantized linears

    bytes_per_parameter: int = 2  # of the original: two in bf16 and fp16, four in float32

    @property
    def original_bytes(self) -> int:
        return self.bf16_bytes // 2 * self.bytes_per_parameter

    @property
    def ratio(self) -> float:
        """How many times smaller than the original."""
        return self.original_bytes / self.checkpoint_bytes

    @property
    def compared(self) -> str:
        """The ratio in words."""
        return f"{self.ratio:.2f} times smaller than {'float32' if self.bytes_per_parameter == 4 else 'bf16'}"
