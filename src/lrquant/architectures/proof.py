"""Verify candidates: each is tried on a block with random scales and shifts, together with those verified before.

A transformation is exact if the block's output stays equal in float64 up to rounding (about 1e-15; a wrong head, pair
or offset changes it by percents). In addition, undoing any one of its changes must change the output: a parameter that
never reaches the output proves nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lrquant.architectures.probe import Probe
from lrquant.transforms import Equivalence, QueryKey, UpToDown, ValueToOutput, materialize, reparameterize
from lrquant.transforms.bias_slots import missing_biases
from lrquant.transforms.statistics import ChannelStatistics

EXACT = 1e-9  # relative to the largest output
SHOWS = 1e-6


def proven(probe: Probe, groups: Iterable[Sequence[Equivalence]]) -> tuple[Equivalence, ...]:
    """The first exact candidate of every group; all of them are exact together."""
    found: list[Equivalence] = []
    for group in groups:
        candidates = [_named_apart(each, found) for each in group if not _joined(each, found)]
        holding = next((each for each in candidates if _holds(probe, each) and _holds_all(probe, [*found, each])), None)
        if holding is not None:
            found.append(holding)
    return tuple(found)


def _joined(candidate: Equivalence, found: Sequence[Equivalence]) -> bool:
    """Whether the columns that `candidate` would scale follow the same linear's rows already."""
    outputs = {each.output for each in found if isinstance(each, ValueToOutput)}
    return isinstance(candidate, UpToDown) and candidate.down in outputs


def _named_apart(candidate: Equivalence, found: Sequence[Equivalence]) -> Equivalence:
    """`candidate` by a name that no other has: learnables are stored under it."""
    if candidate.name not in {each.name for each in found}:
        return candidate
    if isinstance(candidate, UpToDown):
        return replace(candidate, within=f"{candidate.down}:")
    if isinstance(candidate, ValueToOutput):
        return replace(candidate, within=f"{candidate.output}:")
    return replace(candidate, within=f"{candidate.key}:") if isinstance(candidate, QueryKey) else candidate


def _holds_all(probe: Probe, equivalences: Sequence[Equivalence]) -> bool:
    return len(equivalences) == 1 or probe.deviation(_transformed(probe, equivalences)[0]) <= EXACT


def _holds(probe: Probe, equivalence: Equivalence) -> bool:
    try:
        changed, before = _transformed(probe, [equivalence])
    except (IndexError, RuntimeError):  # a layout that does not fit the weights
        return False
    if probe.deviation(changed) > EXACT:
        return False
    # Biases may hide: what a shift adds to all keys leaves the softmax as it is.
    parts = [name for name in changed if not name.endswith(".bias") and not torch.equal(changed[name], before[name])]
    if len(parts) == 1:  # queries and keys of one projection: every second of its rows undone, at random
        (name,) = parts
        undone = torch.rand(len(before[name]), generator=torch.Generator().manual_seed(4)) < 0.5
        halfway = changed[name].clone()
        halfway[undone] = before[name][undone]
        return probe.deviation({name: halfway}) > SHOWS
    return bool(parts) and all(probe.deviation(changed | {name: before[name]}) > SHOWS for name in parts)


def _transformed(probe: Probe, equivalences: Sequence[Equivalence]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The block's parameters by `equivalences` with random scales and shifts, and those it had: those that changed."""
    slots = {slot for each in equivalences for slot in each.bias_slots}
    parameters = probe.parameters | {
        f"{name}.bias": torch.zeros(_outputs(probe.block.get_submodule(name)), dtype=torch.float64)
        for name in missing_biases(probe.block, sorted(slots))
    }
    generator = torch.Generator().manual_seed(3)
    statistics = _Ones(probe.block)
    learnables: dict[str, Tensor] = {}
    for equivalence in equivalences:
        for name, start in equivalence.initial(parameters, statistics, "neutral", 0.5).items():
            random = torch.rand(start.shape, generator=generator, dtype=torch.float64)
            if name == "scale":
                learnables[f"{equivalence.name}.scale"] = 2 ** (2 * random - 1)
            elif equivalence.bias_slots:
                learnables[f"{equivalence.name}.shift"] = random - 0.5
    changed = materialize(parameters, reparameterize(parameters, equivalences, learnables))
    moved = [name for name in changed if changed[name] is not parameters[name]]
    return {name: changed[name] for name in moved}, {name: parameters[name] for name in moved}


def _outputs(module: nn.Module) -> int:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[0]


class _Ones(dict[str, ChannelStatistics]):
    """Statistics of the right shapes for every linear."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, module in block.named_modules():
            width: Any = getattr(module, "in_features", None)
            if width is not None:
                self[name] = ChannelStatistics(torch.ones(width), torch.zeros(width))
