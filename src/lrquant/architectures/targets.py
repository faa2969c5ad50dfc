"""What is quantized: linears. Modules that compute the same in another form become linears that share their memory.

    fused experts (3-D)     one linear for each expert's matrix (experts.py)
    Conv1D (GPT-2)          a linear whose weight is the transposed view

All other code gets the quantized linears of a block from here. Routers and gates, which decide which experts process a
token or how much of a shared expert is added, are not quantized.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lrquant.architectures import experts
from lrquant.runtime import compat


def expose_linears(model: Any) -> None:
    """Turn everything in `model` that is quantized as a linear into one, in place, without changing its function."""
    found = False
    for name, module in list(model.named_modules()):
        if experts.is_fused(module):
            experts.separate(module)
            found = True
        elif (sorted_experts := experts.sorted_experts(module, model)) is not None:
            model.set_submodule(name, sorted_experts)
        elif isinstance(module, Conv1D):
            model.set_submodule(name, experts.view_of(module.weight.T, module.bias))
    for module in model.modules():  # a family's code for new models would look for what is gone
        if is_exposed(module):
            compat.leave_uninitialized(module)
    if found:
        model.set_experts_implementation(experts.IMPLEMENTATION)


def is_exposed(module: nn.Module) -> bool:
    """Whether `module` has linears in place of what its family's own code has there."""
    return experts.are_linears(module) or any(isinstance(child, experts.LinearView) for child in module.children())


def has_exposed(model: nn.Module) -> bool:
    """Whether something in `model` has become a linear that is none in its family's own code."""
    return any(isinstance(module, experts.LinearView) or experts.are_sorted(module) for module in model.modules())


def is_linear(module: Any) -> TypeGuard[nn.Linear]:
    """Whether `module` is a linear layer."""
    return isinstance(module, nn.Linear)


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of `block` that are quantized, by name within it."""
    left = {name for mixture in mixtures_of(block) for name in mixture.gates}
    return {
        name: module for name, module in block.named_modules() if isinstance(module, nn.Linear) and name not in left
    }


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in a block, by names within it."""

    path: str  # of the module whose children are experts
    experts: tuple[str, ...]  # paths of the experts
    gates: tuple[str, ...]  # linears that weigh experts against each other, or a shared one against nothing


def mixtures_of(block: nn.Module) -> list[Mixture]:
    """The mixtures of experts in `block`: modules with two or more experts of one kind, each with linears."""
    found = []
    for path, module in block.named_modules():
        parts = experts_in(module)
        if parts:
            parent = path.rpartition(".")[0]
            gates = _gates(block.get_submodule(parent), path.removeprefix(f"{parent}."), len(parts))
            names = tuple(f"{path}.{name}" for name in parts)
            found.append(Mixture(path, names, tuple(f"{parent}.{gate}" if parent else gate for gate in gates)))
    return found


def experts_alike(block: nn.Module) -> list[tuple[str, ...]]:
    """The names of linears with the same role in all experts of a mixture: all `gate_proj`, all `up_proj` and so on."""
    found: dict[tuple[str, str], list[str]] = {}
    for mixture in mixtures_of(block):
        for expert in mixture.experts:
            for name in linears_of(block.get_submodule(expert)):
                found.setdefault((mixture.path, name), []).append(f"{expert}.{name}")
    return [tuple(names) for names in found.values()]


def experts_in(module: nn.Module) -> list[str]:
    """Names of the children of `module` that are experts."""
    if not (experts.are_linears(module) or isinstance(module, nn.ModuleList)):
        return []
    children = {name: child for name, child in module.named_children() if name.isdecimal()}
    alike = len({type(child) for child in children.values()}) == 1 and len(children) > 1
    linears = [any(map(is_linear, child.modules())) and not is_linear(child) for child in children.values()]
    return list(children) if alike and all(linears) else []


def _gates(parent: nn.Module, own: str, count: int) -> list[str]:
    """Linears beside `count` experts, which are `parent`'s child `own`, that stand alone and give a number for each."""
    found = []
    for child, module in parent.named_children():
        linears = [(name, part) for name, part in module.named_modules(prefix=child) if isinstance(part, nn.Linear)]
        if child != own and len(linears) == 1 and linears[0][1].out_features in (1, count):
            found.append(linears[0][0])
    return found


@contextmanager
def watched_inputs(
    linears: Mapping[str, nn.Module], seen: Callable[[str, Tensor], object], first: bool = False
) -> Iterator[None]:
    """A context in which `seen(name, input)` is called for every input of `linears`; `first`: before any other hook."""

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen(name, inputs[0])

        return hook

    handles = [module.register_forward_pre_hook(watch(name), prepend=first) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
