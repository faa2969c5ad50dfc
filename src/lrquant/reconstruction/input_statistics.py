"""Statistics of the inputs of every linear of a block, collected while a stream passes through the block.

Most linears receive the same number of tokens from every sample. Experts receive the tokens that their router sends to
them; for these, the minimum and maximum over all tokens and the number of tokens are kept. An expert without tokens
gets the combined statistics of the others as a start, and the run's notes name it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lrquant.architectures.targets import experts_alike, linears_of
from lrquant.runtime.distributed import ALONE, Ranks
from lrquant.transforms.statistics import ChannelStatistics, extremes_of


class InputStatistics:
    """Call it with (linear, input) for every input that a linear of `block` receives, `samples` of them at once."""

    def __init__(self, block: nn.Module, ranks: Ranks = ALONE) -> None:
        self.samples = 0  # of the forward pass under way
        self._flat: set[str] = set()
        self._linears, self._ranks = linears_of(block), ranks
        self._alike = experts_alike(block)
        self._statistics: dict[str, ChannelStatistics] = {}
        self._extremes: dict[str, list[Tensor]] = {}  # with several ranks, per sample of this one: (samples, 2, in)
        self._routed: dict[str, Tensor] = {  # by an expert's linear: largest of −x and of x, (2, in)
            name: torch.full((2, self._linears[name].in_features), -torch.inf, device=self._linears[name].weight.device)
            for same in self._alike
            for name in same
        }
        self._tokens = dict.fromkeys(self._routed, 0)

    def __call__(self, name: str, x: Tensor) -> None:
        if x.ndim != 3:
            self._flat.add(name)
        if name in self._routed:
            rows = x.reshape(1, -1, x.shape[-1])
            low, high = extremes_of(rows)
            self._routed[name] = torch.maximum(self._routed[name], torch.cat([-low, high]))
            self._tokens[name] += int(rows.any(-1).sum())  # some families hand an expert zeros for others' tokens
            return
        low, high = extremes_of(x.reshape(self.samples, -1, x.shape[-1]))
        if self._ranks.alone:
            self._statistics.setdefault(name, ChannelStatistics()).add(low, high)
        else:
            self._extremes.setdefault(name, []).append(torch.stack([low, high], 1))

    def statistics(self, samples: int) -> dict[str, ChannelStatistics]:
        """By linear, over all `samples` of all ranks."""
        found = dict(self._statistics)
        for name in sorted(self._extremes):  # an average over samples in their order wants all of them
            everything = self._ranks.in_order(torch.cat(self._extremes[name]), samples)
            found[name] = ChannelStatistics()
            found[name].add(everything[:, 0], everything[:, 1])
        for same in self._alike:
            ends = torch.stack([self._ranks.most(self._routed[name]) for name in same])  # (experts, 2, in)
            together = ends.amax(0)
            for name, own in zip(same, ends, strict=True):
                low, high = torch.where(own.isinf().any(), together, own)
                found[name] = ChannelStatistics(torch.maximum(low, high), (high - low) / 2)
        return found

    def flat(self) -> set[str]:
        """Linears whose inputs have no batch dimension: of experts that play the same part, all or none."""
        return self._flat.union(*(same for same in self._alike if self._flat.intersection(same)))

    def tokens(self, chosen: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Tokens that each expert of each mixture saw, by the path of the expert, over all ranks.

        `chosen` counts them by mixture where experts see more tokens than their router sends them.
        """
        firsts = {name.rpartition(".")[0]: name for same in reversed(self._alike) for name in same}
        own = {expert: self._tokens[name] for expert, name in firsts.items()}
        own |= {f"{path}.{number}": count for path, each in chosen.items() for number, count in enumerate(each)}
        return {expert: int(self._ranks.sum(torch.tensor(count))) for expert, count in own.items()}
