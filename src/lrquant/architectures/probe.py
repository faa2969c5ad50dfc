"""Run a block's own code on random values in float64, with the arguments that its model passes.

The block's real weights are neither read nor changed, so a skeleton without weights is enough. Its inputs (hidden
states of a few tokens, masks, rotary embeddings) come from one pass of the model's own code, in which recorders replace
the blocks. The model's other parameters are random as well.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lrquant.architectures.block_calls import Enough, answering, without_cache
from lrquant.architectures.candidates import TRIED
from lrquant.architectures.double import in_double
from lrquant.architectures.experts import first_experts
from lrquant.architectures.targets import experts_alike
from lrquant.architectures.trace import Trace, trace


class Random:
    """Values for parameters and buffers, the same on every run."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def parameter(self, like: Tensor) -> Tensor:
        """Vectors around one, as norms have them; matrices that keep the size of what they multiply.

        Stacks of matrices (experts) are one matrix, expanded: a block of hundreds of experts would not fit.
        """
        if like.ndim < 2:
            return 0.5 + torch.rand(like.shape, generator=self.generator, dtype=torch.float64)
        shape = (*[1] * (like.ndim - 2), *like.shape[-2:])
        matrix = torch.randn(shape, generator=self.generator, dtype=torch.float64) / like.shape[-1] ** 0.5
        return matrix.expand(like.shape)

    def buffer(self, like: Tensor) -> Tensor:
        """What is there, in float64; in a skeleton without values, something."""
        if not like.is_meta:
            return like.detach().cpu().double() if like.is_floating_point() else like.detach().cpu()
        if like.is_floating_point():
            return torch.rand(like.shape, generator=self.generator, dtype=torch.float64)
        return torch.zeros(like.shape, dtype=like.dtype)

    def of(self, module: nn.Module) -> dict[str, Tensor]:
        """For every parameter and buffer of `module`; every second expert of a mixture has the same ones."""
        values: dict[str, Tensor] = {}
        like = {name: same[at % TRIED] for same in experts_alike(module) for at, name in enumerate(same)}
        for name, parameter in module.named_parameters():
            owner, _, own = name.rpartition(".")
            first = f"{like.get(owner, owner)}.{own}"
            values[name] = values[first] if first in values else self.parameter(parameter)
        return values | {name: self.buffer(buffer) for name, buffer in module.named_buffers()}


@dataclass(frozen=True)
class Call:
    """What a block receives."""

    hidden: Tensor
    arguments: dict[str, Any]


@torch.no_grad()
def calls_of(model: nn.Module, path: str, inputs: Mapping[str, Any]) -> list[Call]:
    """The arguments of each block of the list at `path` in a call of `model` with `inputs`; no block is computed.

    Raises:
        Exception: whatever the model's code raises on inputs that it cannot take.
        LookupError: the call did not reach every block.
    """
    blocks = list(model.get_submodule(path).children())
    calls: dict[int, Call] = {}
    behind: list[Any] = []  # what the first block returns behind its hidden states

    def record(index: int, original: Any, hidden: Tensor, named: dict[str, Any]) -> Any:
        calls[index] = Call(hidden.detach().clone(), without_cache(named))
        if len(calls) == len(blocks):
            raise Enough
        if index == 0:  # its own forward, once: some families wrap what they return
            output = original(hidden.clone(), **without_cache(named))
            behind[:] = [output[1:]] if isinstance(output, tuple) else []
        return (hidden, *behind[0]) if behind else hidden

    random, inside = Random(), f"{path}."
    values = {name: random.parameter(each) for name, each in model.named_parameters() if not name.startswith(inside)}
    values |= {name: random.buffer(each) for name, each in model.named_buffers() if not name.startswith(inside)}
    values |= {f"{path}.0.{name}": value for name, value in random.of(blocks[0]).items()}
    with in_double(), first_experts(blocks[0], TRIED), answering(blocks, record):
        try:
            functional_call(model, values, kwargs=dict(inputs))
        except Enough:
            pass
    if len(calls) < len(blocks):
        raise LookupError(f"{len(blocks) - len(calls)} blocks were not called")
    return [calls[index] for index in range(len(blocks))]


@dataclass
class Probe:
    """One block and one call of it."""

    block: nn.Module
    call: Call
    values: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.values = Random(seed=1).of(self.block)

    @property
    def parameters(self) -> dict[str, Tensor]:
        names = {name for name, _ in self.block.named_parameters()}
        return {name: value for name, value in self.values.items() if name in names}

    def output(self, changed: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output with some values `changed`; biases that it lacks are added to its modules' outputs."""
        values = self.values | dict(changed or {})
        added = [name for name in values if name not in self.values]
        handles = [
            self.block.get_submodule(name.removesuffix(".bias")).register_forward_hook(_adding(values.pop(name)))
            for name in added
        ]
        try:
            with in_double(), first_experts(self.block, TRIED):
                output = functional_call(self.block, values, (self.call.hidden.clone(),), self.call.arguments)
        finally:
            for handle in handles:
                handle.remove()
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @cached_property
    def expected(self) -> Tensor:
        with torch.no_grad():
            return self.output()

    def deviation(self, changed: Mapping[str, Tensor]) -> float:
        """Largest change of an output, relative to the largest output."""
        with torch.no_grad():
            difference = (self.output(changed) - self.expected).abs().max()
        return float(difference / self.expected.abs().max())

    def trace(self) -> Trace:
        """What happens within one call, with gradients."""
        hidden = self.call.hidden.clone().requires_grad_()

        def call() -> None:
            with in_double(), first_experts(self.block, TRIED):
                functional_call(self.block, self.values, (hidden * 1.0,), self.call.arguments)

        return trace(self.block, call)


def _adding(bias: Tensor) -> Any:
    return lambda module, inputs, output: output + bias


def text_inputs(model: Any, tokens: int) -> Sequence[dict[str, Any]]:
    """Ordinary tokens, none that means a picture, padding or an end; positions count from zero where they may."""
    config = model.config
    text = config.get_text_config()
    special = {value for part in (config, text) for name, value in vars(part).items() if _names_token(name, value)}
    candidates = [token for token in range(min(text.vocab_size, 4096)) if token not in special]
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(2))
    inputs: dict[str, Any] = {"input_ids": torch.tensor([[candidates[index] for index in order[:tokens].tolist()]])}
    known = inspect.signature(model.forward).parameters
    if "use_cache" in known or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values()):
        inputs["use_cache"] = False
    positions = {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]} if "position_ids" in known else {}
    return (inputs | positions, inputs) if positions else (inputs,)


def _names_token(name: str, value: Any) -> bool:
    return isinstance(value, int) and name.endswith(("token_id", "token_index"))


def picture_inputs(config: Any) -> Sequence[dict[str, Any]]:
    """Forms in which vision towers take an image; the first that a tower accepts is used."""
    random = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def setting(*names: str, default: int) -> int:
        found = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)
        return found[0] if isinstance(found, list | tuple) else found

    channels = setting("num_channels", "in_channels", "in_chans", default=3)
    patch = setting("patch_size", default=14)
    side = setting("image_size", default=4 * patch)
    flat = channels * patch * patch
    frames = setting("temporal_patch_size", default=1)
    merge = 2 * setting("spatial_merge_size", default=1)
    picture = noise(1, channels, side, side)
    return (
        {"pixel_values": picture},
        {"pixel_values": picture, "image_sizes": torch.tensor([[side, side]])},
        {"hidden_states": noise(merge * merge, flat * frames), "grid_thw": torch.tensor([[1, merge, merge]])},
        {
            "pixel_values": noise(1, merge * merge, flat),
            "pixel_attention_mask": torch.ones(1, merge * merge, dtype=torch.long),
            "spatial_shapes": torch.tensor([[merge, merge]]),
        },
    )
