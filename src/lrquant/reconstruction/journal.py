"""The engine's interface to a journal of finished blocks, its own and those of an earlier run.

The engine does not use files. It asks a journal whether a block is finished. If so, the block gets the journal's
parameters and runs forward twice, after which both streams are the same as if it had been learned. The journal here is
empty; the one on disk is `lrquant.resume.journal`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from lrquant.reconstruction.block_parameters import FrozenBlock
from lrquant.reconstruction.learnables import without_large
from lrquant.reconstruction.records import BlockRecord
from lrquant.runtime.distributed import Ranks
from lrquant.transforms.statistics import ChannelStatistics


@dataclass
class FinishedBlock:
    """A finished block, on the CPU. Names are relative to the block."""

    learnables: dict[str, Tensor]
    statistics: dict[str, ChannelStatistics]  # of every linear's input
    record: BlockRecord
    flat_inputs: tuple[str, ...]  # linears that see (tokens, width)
    added_biases: tuple[str, ...]  # modules that got a bias for a shift
    static_scales: dict[str, Tensor] = field(default_factory=dict)  # FrozenBlock.static_scales
    carried: dict[str, Tensor] = field(default_factory=dict)  # learnables that the next window goes on from

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, named `learned:NAME`, `carried:NAME`, `static:NAME`, `absmax:LINEAR` or `midpoint:LINEAR`."""
        found = {f"learned:{name}": tensor for name, tensor in self.learnables.items()}
        found |= {f"carried:{name}": tensor for name, tensor in self.carried.items()}
        found |= {f"static:{name}": tensor for name, tensor in self.static_scales.items()}
        for linear, seen in self.statistics.items():
            for kind, tensor in (("absmax", seen.absmax), ("midpoint", seen.midpoint)):
                if tensor is not None:
                    found[f"{kind}:{linear}"] = tensor
        return found

    def without_offsets(self) -> "FinishedBlock":
        """The same without learnables that are as large as the block: learned rounding's offsets."""
        return replace(self, learnables=without_large(self.learnables))

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], record: BlockRecord, flat_inputs: Sequence[str], added_biases: Sequence[str]
    ) -> "FinishedBlock":
        """From `tensors()`; other names are left alone."""
        learned: dict[str, Tensor] = {}
        carried: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}
        statistics: dict[str, ChannelStatistics] = {}
        for name, tensor in tensors.items():
            kind, _, of = name.partition(":")
            if kind == "learned":
                learned[of] = tensor
            elif kind == "carried":
                carried[of] = tensor
            elif kind == "static":
                scales[of] = tensor
            elif kind in ("absmax", "midpoint"):
                setattr(statistics.setdefault(of, ChannelStatistics()), kind, tensor)
        return cls(learned, statistics, record, tuple(flat_inputs), tuple(added_biases), scales, carried)


class Journal:
    """An empty journal: no block is finished, and frozen blocks stay in memory."""

    keeps_frozen = False  # whether frozen blocks need not be kept in memory besides

    def open(self, blocks: int) -> None:
        """Called once, before the first block."""

    def bits(self, found: Callable[[], dict[str, int]]) -> dict[str, int]:
        """Bits by linear (passes/mixed_precision.py): what `found` finds, or found before."""
        return found()

    def finished(self, place: int) -> bool:
        """Whether block number `place` is finished."""
        return False

    def restore(self, place: int, block: nn.Module) -> tuple[FinishedBlock, Mapping[str, Tensor]] | None:
        """The finished block and its dequantized parameters; None: it has to be done again.

        `block` still holds the original's parameters.
        """
        return None

    def summary(self, place: int) -> FinishedBlock:
        """As `restore`, for a block whose outputs are not needed any more."""
        raise LookupError(f"block {place} was not finished")

    def block_done(self, place: int, path: str, block: nn.Module, finished: FinishedBlock, frozen: FrozenBlock) -> None:
        """`block`, at `path` in the model, is learned and frozen."""


class SharedJournal(Journal):
    """The journal of the first rank, shared with all ranks: only the first rank reads and writes files."""

    keeps_frozen = True

    def __init__(self, own: Journal, ranks: Ranks) -> None:
        self._own, self._ranks = own, ranks  # on the other ranks, a journal that remembers nothing

    def open(self, blocks: int) -> None:
        if self._ranks.first:
            self._own.open(blocks)

    def bits(self, found: Callable[[], dict[str, int]]) -> dict[str, int]:
        if not self._ranks.first:
            if self._ranks.text("") == "unknown":
                found()
            return json.loads(self._ranks.text(""))  # type: ignore[no-any-return]
        asked = False

        def together() -> dict[str, int]:
            nonlocal asked
            asked = True
            self._ranks.text("unknown")
            return found()

        bits = self._own.bits(together)
        if not asked:
            self._ranks.text("known")
        return json.loads(self._ranks.text(json.dumps(bits)))  # type: ignore[no-any-return]

    def finished(self, place: int) -> bool:
        return self._ranks.text(str(self._own.finished(place))) == "True"

    def restore(self, place: int, block: nn.Module) -> tuple[FinishedBlock, Mapping[str, Tensor]] | None:
        found = self._own.restore(place, block) if self._ranks.first else None
        if self._ranks.text("kept" if found else "lost") == "lost":
            return None
        parameters = self._ranks.tensors(found[1] if found else {})
        return self._told(found[0] if found else None), parameters

    def summary(self, place: int) -> FinishedBlock:
        return self._told(self._own.summary(place) if self._ranks.first else None)

    def block_done(self, place: int, path: str, block: nn.Module, finished: FinishedBlock, frozen: FrozenBlock) -> None:
        if self._ranks.first:
            self._own.block_done(place, path, block, finished, frozen)

    def _told(self, finished: FinishedBlock | None) -> FinishedBlock:
        tensors = self._ranks.tensors(finished.tensors() if finished else {})
        facts = [finished.record.as_dict(), finished.flat_inputs, finished.added_biases] if finished else []
        record, flat_inputs, added_biases = json.loads(self._ranks.text(json.dumps(facts)))
        return FinishedBlock.of(tensors, BlockRecord(**record), flat_inputs, added_biases)
