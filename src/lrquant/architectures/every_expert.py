"""Transformations that were found of a few experts of a mixture, for all of its experts: they run the same code.

norm → linears      the scale of one norm goes into the router, the shared expert and every routed expert
up → down           every expert has scales of its own
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lrquant.architectures.targets import experts_alike
from lrquant.transforms import Equivalence, NormToLinears, UpToDown


def for_every_expert(block: nn.Module, found: Sequence[Equivalence]) -> tuple[Equivalence, ...]:
    """What was `found` of some experts of each mixture in `block`, of all of them; all else as it is."""
    alike = {name: same for same in experts_alike(block) for name in same}
    result: dict[str, Equivalence] = {}
    for each in found:
        extended: list[Equivalence] = [each]
        if isinstance(each, NormToLinears):
            linears = (linear for name in each.linears for linear in alike.get(name, (name,)))
            extended = [replace(each, linears=tuple(dict.fromkeys(linears)))]
        elif isinstance(each, UpToDown) and each.up in alike and each.down in alike:
            pairs = zip(alike[each.up], alike[each.down], strict=True)
            extended = [replace(each, up=up, down=down, within=f"{_expert(down)}.") for up, down in pairs]
        result |= {one.name: one for one in extended}
    return tuple(result.values())


def name_in_every_expert(name: str) -> str:
    """`mlp.experts.3.up->down` → `mlp.experts.*.up->down`."""
    return re.sub(r"(experts)\.\d+\.", r"\1.*.", name)


def _expert(linear: str) -> str:
    return linear.rpartition(".")[0]
