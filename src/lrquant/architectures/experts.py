"""Experts of a mixture as ordinary linears, whose weights are views of the fused 3-D parameters.

transformers 5 stores the experts of a layer as `gate_up_proj` (experts, 2·width, hidden) and `down_proj` (experts,
hidden, width), in some families transposed, interleaved, with biases or without a gate. The class declares this
(`use_experts_implementation`). Here, the module `…experts` keeps its class and gets a child for every expert,

    experts.3.gate_proj, experts.3.up_proj, experts.3.down_proj

whose weights are views of the fused memory: nothing is copied, and changing a view changes the fused tensor. From then
on, the matrix of an expert is a linear like any other, with hooks, statistics, learnables and a name of its own, which
is also its name in checkpoints. The forward pass uses transformers' experts interface, as attention uses its attention
interface (formats/activation_quant).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from lrquant.runtime import compat

IMPLEMENTATION = "lrquant"
_EVERYTHING = "_lrquant_sees_everything"  # an experts module's, while all see all tokens: how many were each's
_FEW = "_lrquant_few"  # an experts module's, while only its first ones work: how many
_FALLBACK = "batched_mm"  # for experts that are not linears


class Expert(nn.Module):
    """One expert's linears. Their module computes with them (`_forward`)."""


def is_fused(module: nn.Module) -> bool:
    """Whether `module` has the matrices of several experts in fused parameters, and declares their layout."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.ndim == 3 and hasattr(module, "is_transposed")


def are_linears(module: nn.Module) -> bool:
    """Whether `module` is one whose experts have become linears."""
    return isinstance(getattr(module, "0", None), Expert)


_GATED: dict[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_PLAIN: dict[str, tuple[str, ...]] = {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}


class LinearView(nn.Linear):
    """A linear whose weight is a view of a tensor that the model's own code stores in another form."""


def fused_layout(module: Any) -> dict[str, tuple[str, ...]]:
    """Fused parameters of an experts `module` → the linears that their rows are, in order."""
    return _GATED if module.has_gate else _PLAIN


def separate(module: Any) -> None:
    """Give a fused experts `module` one linear for each expert's matrix, as views of its parameters."""
    experts = [Expert() for _ in range(module.num_experts)]
    for fused, linears in fused_layout(module).items():
        weights, biases = getattr(module, fused), getattr(module, f"{fused}_bias", None)
        for number, expert in enumerate(experts):
            weight = weights[number].T if module.is_transposed else weights[number]  # (out of all `linears`, in)
            bias = None if biases is None else biases[number]
            for place, name in enumerate(linears):
                rows = rows_of(weight.shape[0], place, len(linears), concatenated=module.is_concatenated)
                expert.add_module(name, view_of(weight[rows], None if bias is None else bias[rows]))
        delattr(module, fused)
        if biases is not None:
            delattr(module, f"{fused}_bias")
    for number, expert in enumerate(experts):
        module.add_module(str(number), expert)


def rows_of(count: int, place: int, parts: int, *, concatenated: bool) -> slice:
    """Rows of the part at `place` of `parts` equal ones, which lie one after the other or row by row in turn."""
    return slice(place * count // parts, (place + 1) * count // parts) if concatenated else slice(place, None, parts)


def sorted_experts(module: nn.Module, model: Any) -> nn.Module | None:
    """Llama 4's fused experts, which are handed all tokens sorted by expert, as linears; None: `module` is none.

    transformers has such a class for quantized checkpoints. Its linears become views of the fused memory here too.
    """
    patch = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__)
    if patch is None:
        return None
    with torch.device("meta"):
        result: nn.Module = patch["module_name"](model.config.get_text_config())  # type: ignore[operator]
    for fused, linears in _GATED.items():
        weights: Tensor = getattr(module, fused)  # (experts, in, out of all `linears`)
        for number, expert in enumerate(result.children()):
            for place, name in enumerate(linears):
                weight = weights[number].T
                rows = rows_of(weight.shape[0], place, len(linears), concatenated=True)
                expert.register_module(name, view_of(weight[rows], None, nn.Linear))
    return result


def are_sorted(module: nn.Module) -> bool:
    """Whether `module` is one that `sorted_experts` makes."""
    return type(module) in [patch["module_name"] for patch in MODULES_TO_PATCH_FOR_QUANTIZATION.values()]


def view_of(weight: Tensor, bias: Tensor | None, kind: type[nn.Linear] = LinearView) -> nn.Linear:
    """A linear whose parameters are these very tensors, (out, in) and (out,)."""
    linear = kind(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _forward(
    self: Any,
    hidden_states: Tensor,  # (tokens, hidden)
    top_k_index: Tensor,  # (tokens, k), the experts of each token
    top_k_weights: Tensor,  # (tokens, k)
) -> Tensor:
    """The weighted sum of each token's experts, (tokens, hidden)."""
    if not are_linears(self):
        result: Tensor = ALL_EXPERTS_FUNCTIONS[_FALLBACK](self, hidden_states, top_k_index, top_k_weights)
        return result
    everything = getattr(self, _EVERYTHING, None)
    if (few := getattr(self, _FEW, None)) is not None:
        tokens, choices = (torch.arange(count, device=top_k_index.device) for count in top_k_index.shape)
        top_k_weights = top_k_weights * (1 + top_k_index)
        top_k_index = (tokens[:, None] + choices) % few
    output = torch.zeros_like(hidden_states)
    for number in range(self.num_experts):
        slots, tokens = torch.where((top_k_index == number).T)
        if everything is not None:
            everything[number] += len(tokens)
            found = _answer(self, number, hidden_states)[tokens]
        elif len(tokens):
            found = _answer(self, number, hidden_states[tokens])
        else:
            continue
        found = found * top_k_weights[tokens, slots, None]
        output.index_add_(0, tokens, found.to(output.dtype))
    return output


def _answer(module: Any, number: int, x: Tensor) -> Tensor:
    """The output of expert `number` for `x` (tokens, hidden)."""
    expert = module.get_submodule(str(number))
    if module.has_gate:
        pair = expert.gate_proj(x), expert.up_proj(x)
        both = torch.cat(pair, -1) if module.is_concatenated else torch.stack(pair, -1).flatten(-2)
        inner = compat.gated(module, both)
    else:
        inner = module.act_fn(expert.up_proj(x))
    result: Tensor = expert.down_proj(inner)
    return module.post_expert_norm(result) if module.has_post_expert_norm else result


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)


def without_merging(conversions: Sequence[Any], model: nn.Module) -> list[Any]:
    """transformers' weight `conversions` without those into fused experts that are linears in `model`."""
    from transformers.core_model_loading import WeightConverter

    fused = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if are_linears(module)
        for name in fused_layout(module)
    ]
    return [
        entry
        for entry in conversions
        if not isinstance(entry, WeightConverter)
        or not any(re.search(f"{pattern}$", name) for pattern in entry.target_patterns for name in fused)
    ]


def names_in_files(model: Any) -> dict[str, str]:
    """Experts' linears by their names in `model` → as checkpoints of its family call them, where they stand apart.

    transformers itself says so: it takes apart a fused tensor of numbers that tell where they come from.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if not are_linears(module):
            continue
        for fused, linears in fused_layout(module).items():
            count = len(linears)
            codes = torch.arange(float(module.num_experts * count)).view(-1, count, 1)  # (experts, parts, 1)
            codes = codes.transpose(1, 2) if module.is_transposed else codes
            apart = revert_weight_conversion(model, {f"{path}.{fused}": codes})
            for name, code in apart.items():
                if code.numel() == 1 and len(apart) == codes.numel():
                    expert, part = divmod(int(code), count)
                    found[f"{path}.{expert}.{linears[part]}"] = name.removesuffix(".weight")
    return found


@contextmanager
def seeing_everything(block: nn.Module) -> Iterator[Mapping[str, list[int]]]:
    """A context in which every expert of `block` processes all tokens, so that hooks on its linears see all of them.

    The block's output still follows the router's choice. Yields the number of tokens routed to each expert so far, by
    the path of its mixture.
    """
    modules = _mixtures(block)
    chosen = {path: [0] * module.num_experts for path, module in modules.items()}
    with _with(_EVERYTHING, [(module, chosen[path]) for path, module in modules.items()]):
        yield chosen


@contextmanager
def first_experts(block: nn.Module, count: int) -> Iterator[None]:
    """Within, the first `count` experts of each mixture in `block` work in turns, whichever its router chooses.

    All experts run the same code, so what a trial shows of a few holds for all, and takes a fraction of the memory.
    What an expert answers is multiplied by the chosen one's number: a change of the router's choice shows.
    """
    with _with(_FEW, [(module, count) for module in _mixtures(block).values()]):
        yield


def _mixtures(block: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in block.named_modules() if are_linears(module)}


@contextmanager
def _with(attribute: str, values: Iterable[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Within, each of these modules has its value of `attribute`."""
    given = list(values)
    for module, value in given:
        setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, _ in given:
            delattr(module, attribute)
