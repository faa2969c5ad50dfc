"""A block's loss as one compiled graph: fake quantization fused with the model's own code, forward and backward.

On a CPU, a step of a small block spends as much time between operations as in them. In one compiled graph, rounding is
fused with the loops that produce its inputs, and no Python runs within a step. Blocks that differ only in their tensors
share a graph: it is compiled from a skeleton without weights, and each block supplies its own.

Everything that determines integers (scales, clips, ranges) is computed outside the graph, by the same operations as in
freezing, and the arithmetic inside is that of `formats/fake_quant_math.py`. So a graph rounds weights to the same
integers.
"""

import copy
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lrquant.architectures.targets import mixtures_of
from lrquant.formats.kernels import COMPILES_EXACTLY
from lrquant.losses import means
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_parameters import Prepared, prepared, rounded_weights
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.runtime import compat
from lrquant.runtime.execution import matrix_products
from lrquant.runtime.profile import part

_SIMPLE = (bool, int, float, str, torch.dtype, type(None))
_PLACE = {"layer_idx"}  # tells blocks apart that run the same code

_log = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]


class CompiledBlock:
    """The compiled loss of every block of one kind."""

    def __init__(self, skeleton: nn.Module, fixed: BlockParameters, recipe: Recipe, device: torch.device) -> None:
        self.works = True  # until the model's code turns out not to compile
        self._compiled = False
        dtype = next(skeleton.parameters()).dtype
        product = torch.bfloat16 if recipe.products == "bfloat16" else dtype

        def answer(
            weights: Tensors,
            others: Tensors,
            by: Prepared,
            hidden: Tensor,
            arguments: Mapping[str, Any],
            targets: Sequence[Tensor],
        ) -> Tensor:
            parameters = {**others, **by.vectors, **rounded_weights(fixed, weights, by, dtype, product)}
            with matrix_products(recipe.products, device):
                output = functional_call(skeleton, parameters, (hidden,), dict(arguments))
            return means(output[0] if isinstance(output, tuple) else output, targets, recipe.loss)

        compat.allow_many_graphs()
        # Without emulated casts, a scale that the checkpoint rounds would keep its extra digits inside the loop.
        self._answer = torch.compile(answer, fullgraph=True, dynamic=False, options={"emulate_precision_casts": True})

    def __call__(
        self,
        block: nn.Module,
        fixed: BlockParameters,
        learnables: Tensors,
        hidden: Tensor,
        arguments: Mapping[str, Any],
        targets: Sequence[Tensor],
    ) -> Tensor | None:
        """The terms of the loss (losses.means) for `block` on `hidden`, or None if its code does not compile.

        Once None, it stays None for blocks with the same code.
        """
        if not torch.is_grad_enabled():  # the graph that learns: no second one is compiled to measure with
            with torch.enable_grad():
                leaves = {name: tensor.detach().requires_grad_() for name, tensor in learnables.items()}
                found = self(block, fixed, leaves, hidden, arguments, targets)
            return None if found is None else found.detach()
        by = prepared(fixed, learnables, next(block.parameters()).dtype)
        weights = {name: fixed.tensors[name] for name in (f"{linear}.weight" for linear in fixed.linears)}
        others = {
            name: tensor.detach()
            for name, tensor in (*block.named_parameters(), *block.named_buffers())
            if name not in weights and name not in by.vectors
        }
        try:
            with nullcontext() if self._compiled else _compiling():
                answer: Tensor = self._answer(weights, others, by, hidden, arguments, targets)
            self._compiled = True
            return answer
        except compat.compile_errors() as error:
            self.works = False
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            _log.info("%s cannot be compiled as one graph: %s", type(block).__name__, first)
            return None


@contextmanager
def _compiling() -> Iterator[None]:
    with part("compile"), compat.kept_on_disk():
        yield


def _ask_compiler() -> None:
    """Have PyTorch probe the C++ compiler in the background, which takes seconds on a new machine.

    An error here is ignored, because it occurs and is reported again where the compiler is needed.
    """
    question = compat.question_to_the_cpp_compiler()

    def ask() -> None:
        with suppress(Exception):
            question()

    threading.Thread(target=ask, name="lrquant probes the compiler", daemon=True).start()


@dataclass
class CompiledBlocks:
    """The graphs of one run."""

    recipe: Recipe
    device: torch.device
    known: dict[Any, CompiledBlock] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self._useful():
            _ask_compiler()

    def _useful(self) -> bool:
        """A graph is for a processor, on which time goes between small operations; CUDA has kernels of its own."""
        return self.recipe.kernels == "compiled" and self.device.type == "cpu" and COMPILES_EXACTLY

    def of(self, block: nn.Module, fixed: BlockParameters) -> CompiledBlock | None:
        """The graph for `block`, whose activations are being quantized (formats.activations); None: it has no use."""
        if not self._useful() or fixed.format is None or fixed.formats:  # each choice would need a graph of its own
            return None
        if mixtures_of(block):  # which tokens an expert sees is found by the call itself
            return None
        kind = _kind(block, fixed)
        if kind not in self.known:
            self.known[kind] = CompiledBlock(_skeleton(block), replace(fixed, tensors={}), self.recipe, self.device)
        return self.known[kind]


def _skeleton(block: nn.Module) -> nn.Module:
    """A copy of `block` with its hooks, and without the memory of its parameters and buffers."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(tensor): _empty(tensor) for tensor in tensors})


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _kind(block: nn.Module, fixed: BlockParameters) -> Any:
    """Equal for blocks that run the same code on tensors of the same shapes."""
    modules = [
        (
            name,
            type(module),
            tuple(
                (key, value) for key, value in vars(module).items() if isinstance(value, _SIMPLE) and key not in _PLACE
            ),
        )
        for name, module in block.named_modules()
    ]
    shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in block.state_dict(keep_vars=True).items()]
    return (*modules, *shapes, fixed.linears, fixed.format, fixed.storage_dtype, fixed.product_dtype)
