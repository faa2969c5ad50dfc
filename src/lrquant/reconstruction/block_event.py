"""What a callback can inspect while a block is reconstructed.

The engine calls its callback when a block begins, while both streams still hold the block's inputs, when its parameters
have been learned, and when it ends. Inspecting a block changes nothing (see `lrquant.report`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from lrquant.formats.schemes import AttentionScheme
from lrquant.reconstruction.block_parameters import FrozenBlock
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables import Learnables

# (a stream or part of one, by sample; sample; parameters in place of the block's own) → output, (1, tokens, hidden)
Call = Callable[[Mapping[int, Tensor], int, Mapping[str, Tensor] | None], Tensor]


@dataclass(frozen=True)
class BlockEvent:
    """A block, a function that runs it, and its two streams, which the engine overwrites before the block ends."""

    index: int
    path: str
    block: nn.Module
    call: Call
    full_precision: Sequence[Tensor]  # x per sample
    quantized: Sequence[Tensor]  # x̂ per sample


@dataclass(frozen=True)
class BlockDecision:
    """How a block was quantized. `start` and `learned` are the learnables before and after learning."""

    fixed: BlockParameters
    start: Learnables
    learned: Learnables
    frozen: FrozenBlock
    input_args: Mapping[nn.Linear, QuantizationArgs | None]
    attention_scheme: AttentionScheme | None
