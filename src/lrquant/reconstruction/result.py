"""What the engine is given of a quantized model, and what it leaves behind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lrquant.passes.end_to_end import Tuning
from lrquant.passes.non_block_modules import NonBlockModules
from lrquant.passes.rotation import Rotated
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_parameters import FrozenBlock
from lrquant.reconstruction.journal import FinishedBlock
from lrquant.reconstruction.learnables import Learnables
from lrquant.reconstruction.records import BlockRecord
from lrquant.transforms.statistics import ChannelStatistics


@dataclass
class Reconstruction:
    """What the engine leaves behind besides the model, whose blocks now hold the quantized values."""

    recipe: Recipe  # as it was carried out: what it left to the machine is decided
    block_paths: list[str]  # in the order that data flows
    frozen: list[FrozenBlock] = field(default_factory=list)  # empty where a journal keeps them as they are
    learned: list[Learnables] = field(default_factory=list)  # without offsets where a journal keeps them
    statistics: list[dict[str, ChannelStatistics]] = field(default_factory=list)
    records: list[BlockRecord] = field(default_factory=list)
    flat_inputs: set[str] = field(default_factory=set)  # linears (full names) that see (tokens, width)
    added_biases: tuple[str, ...] = ()  # modules (full names) that got a bias for a shift
    rotated: Rotated = field(default_factory=Rotated)
    attention_quantized: bool = False
    outside: NonBlockModules = field(default_factory=NonBlockModules)  # what was rounded besides the blocks
    tuning: Tuning | None = None  # what came of learning the whole at last

    @property
    def needs_lrquant(self) -> bool:
        """Whether the model computes something that its family's own code does not."""
        return bool(self.added_biases or self.rotated.online)

    def add(self, path: str, finished: FinishedBlock, with_offsets: bool) -> None:
        """Take up the block at `path`. Offsets are left out where memory must not grow with the model."""
        self.learned.append(finished.learnables if with_offsets else finished.without_offsets().learnables)
        self.statistics.append(finished.statistics)
        self.records.append(finished.record)
        self.flat_inputs |= {f"{path}.{name}" for name in finished.flat_inputs}
        self.added_biases += tuple(f"{path}.{name}" for name in finished.added_biases)

    def flat_inputs_within(self, path: str) -> set[str]:
        """Names, within the block at `path`, of the linears that see (tokens, width)."""
        return {name.removeprefix(f"{path}.") for name in self.flat_inputs if name.startswith(f"{path}.")}


@dataclass(frozen=True)
class Present:
    """A quantized model whose blocks `relearned` are to be learned again (test-time adaptation)."""

    blocks: Sequence[Mapping[str, Tensor]]  # dequantized parameters of every block, by name
    relearned: frozenset[int]
    input_scales: Sequence[Mapping[str, Tensor]] = ()  # of every block (FrozenBlock.input_scales), if there are any

    def scales(self, place: int) -> Mapping[str, Tensor]:
        return self.input_scales[place] if self.input_scales else {}
