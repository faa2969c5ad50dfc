"""The results of the passes besides the model, whose blocks then have their quantized values."""

from dataclasses import dataclass, field

from lrquant.formats.fake_quant import QuantizedWeight
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_parameters import FrozenBlock
from lrquant.reconstruction.journal import FinishedBlock
from lrquant.reconstruction.learnables import Learnables
from lrquant.reconstruction.records import BlockRecord, Outcome
from lrquant.transforms.statistics import ChannelStatistics


@dataclass(frozen=True)
class Rotated:
    """Changes that rotations made to a model besides its weights."""

    online: tuple[str, ...] = ()  # linears (full names) whose inputs are transformed at run time
    untied: int = 0  # parameters that it has more, because embeddings and head no longer are one tensor
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class NonBlockModules:
    """Linears outside the blocks that were rounded, by their full names; `flat` ones see (samples, width) inputs."""

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    flat: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Tuning:
    """The outcome of end-to-end tuning: divergences from the original, in nats per token."""

    initial_loss: float
    final_loss: float
    outcome: Outcome
    epoch_losses: list[float] = field(default_factory=list)


@dataclass
class Reconstruction:
    """The results of a run besides the model."""

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
    own_layout: bool = False  # whether plain transformers has no place for some of the linears (export/expert_layout)
    tuning: Tuning | None = None  # None: there was none
    zero: list[str] = field(default_factory=list)  # matrices of the source (full names) that are zero throughout

    @property
    def needs_lrquant(self) -> bool:
        """Whether the model computes something that its family's own code does not."""
        return bool(self.added_biases or self.rotated.online or self.own_layout)

    def add(self, path: str, finished: FinishedBlock, with_offsets: bool) -> None:
        """Add the block at `path`. Rounding offsets are left out if memory must not grow with the model."""
        self.learned.append(finished.learnables if with_offsets else finished.without_offsets().learnables)
        self.statistics.append(finished.statistics)
        self.records.append(finished.record)
        self.flat_inputs |= {f"{path}.{name}" for name in finished.flat_inputs}
        self.added_biases += tuple(f"{path}.{name}" for name in finished.added_biases)

    def flat_inputs_within(self, path: str) -> set[str]:
        """Names, within the block at `path`, of the linears that see (tokens, width)."""
        return {name.removeprefix(f"{path}.") for name in self.flat_inputs if name.startswith(f"{path}.")}
