"""The state of a run, the task of one block, and the protocol of providers of parameters.

Run             the model, its recipe and samples, and the services around them
BlockTask       one block on the device, with the original's weights; both streams hold what it receives
BlockOutcome    what the block computes with from now on
ParameterProvider   BlockTask → BlockOutcome; or None, and the next provider is asked
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from lrquant.calibration.activation_cache import ActivationStore, Stream
from lrquant.errors import UsageError
from lrquant.formats.activation_quant import quantized_activations, route_attention
from lrquant.formats.schemes import AttentionScheme
from lrquant.loading.block_source import BlockSource
from lrquant.loading.original import BlockPlace, Original
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_event import BlockEvent
from lrquant.reconstruction.block_forward import BlockForward
from lrquant.reconstruction.block_parameters import FrozenBlock
from lrquant.reconstruction.block_preparation import enabled_equivalences, linear_input_args
from lrquant.reconstruction.callbacks import Callback
from lrquant.reconstruction.compiled_block import CompiledBlocks
from lrquant.reconstruction.journal import FinishedBlock, Journal
from lrquant.reconstruction.result import Reconstruction
from lrquant.runtime.execution import Machine
from lrquant.transforms import Equivalence


@dataclass
class Run:
    """The state of a run while its passes are carried out.

    Args:
        original: the full-precision model; its blocks are quantized in place.
        recipe: the resolved recipe.
        samples: keyword arguments of single-sample calls, those of all ranks.
        cache: keeps the two streams.
        providers: providers of blocks' parameters, in order; none: the journal, then learning.
        keeps_blocks: whether a later pass needs the frozen parameters of all blocks and the full-precision stream.
    """

    original: Original
    recipe: Recipe
    samples: Sequence[dict[str, Any]]
    machine: Machine
    cache: ActivationStore
    journal: Journal = field(default_factory=Journal)
    callback: Callback = field(default_factory=Callback)
    providers: Sequence["ParameterProvider"] = ()
    keeps_blocks: bool = False
    result: Reconstruction = field(init=False)
    full_precision: Stream | None = field(init=False, default=None)  # x behind the last block, where blocks are kept

    def __post_init__(self) -> None:
        paths = [place.path for place in self.places]
        for place in self.places if self.recipe.let else ():
            place.stage.equivalences_of(place.within)  # found, where they are, before anything changes the blocks
        self.result = Reconstruction(self.recipe, paths, attention_quantized=self.attention_scheme is not None)

    @property
    def model(self) -> Any:
        return self.original.model

    @property
    def storage_dtype(self) -> torch.dtype:
        """The checkpoint's floating-point type."""
        return self.original.storage_dtype

    @property
    def block_source(self) -> BlockSource:
        """Keeps blocks while they are not in use."""
        return self.original.block_source

    def decide(self, **changes: Any) -> None:
        """Record a decision of a pass in the recipe, such as the bits of each linear."""
        self.recipe = self.result.recipe = self.recipe.changed(**changes)

    @property
    def places(self) -> Sequence[BlockPlace]:
        return self.original.places

    @cached_property
    def attention_scheme(self) -> AttentionScheme | None:
        """How queries, keys and values are rounded; None: they are not, or the family's attention cannot be reached.

        Raises:
            UsageError: the cache is to be quantized, and cannot be reached.
        """
        attention = self.recipe.scheme.attention_inputs
        if self.recipe.kv_cache is not None:
            if not self.model.can_generate() or "vision" in (self.recipe.towers or ()):
                raise UsageError(f"kv_cache = {self.recipe.kv_cache}: only blocks of language models have a cache")
            if not route_attention(self.model):
                raise UsageError("this family's attention cannot be quantized: leave out kv_cache")
        return attention if attention is not None and route_attention(self.model) else None

    @cached_property
    def own_samples(self) -> Sequence[dict[str, Any]]:
        """This rank's."""
        return self.machine.ranks.share(self.samples)

    @cached_property
    def compiled(self) -> CompiledBlocks:
        return CompiledBlocks(self.recipe, self.machine.device)

    def equivalences(self, place: BlockPlace) -> Sequence[Equivalence]:
        return enabled_equivalences(place.stage.equivalences_of(place.within), self.recipe, place.path)

    def input_args(self, block: nn.Module, path: str, flat: set[str]) -> dict[nn.Linear, QuantizationArgs | None]:
        """Activation format of every linear's input in `block` at `path`; `flat` ones see (tokens, width)."""
        return linear_input_args(block, self.recipe.scheme.within(path), flat)

    @contextmanager
    def activations_quantized(self, blocks: int) -> Iterator[None]:
        """A context in which the first `blocks` blocks, which are finished, run with quantized activations."""
        with ExitStack() as quantized:
            for path in self.result.block_paths[:blocks]:
                block = self.model.get_submodule(path)
                inputs = self.input_args(block, path, self.result.flat_inputs_within(path))
                quantized.enter_context(quantized_activations(block, inputs, self.attention_scheme))
            yield


@dataclass(frozen=True)
class BlockTask:
    """One block on the device, with its original weights; both streams hold its inputs."""

    run: Run
    place: BlockPlace
    block: nn.Module
    forward: BlockForward
    full_precision: Stream  # x
    quantized: Stream  # x̂

    @cached_property
    def event(self) -> BlockEvent:
        return BlockEvent(
            self.place.index,
            self.place.path,
            self.block,
            self.forward.call_one,
            self.full_precision,
            self.quantized,
        )

    @property
    def equivalences(self) -> Sequence[Equivalence]:
        return self.run.equivalences(self.place)


@dataclass(frozen=True)
class BlockOutcome:
    """The final parameters of a block, and its record."""

    parameters: Mapping[str, Tensor]  # by name within the block
    static_scales: Mapping[str, Tensor]  # FrozenBlock.static_scales
    flat_inputs: set[str]  # linears that see (tokens, width)
    finished: FinishedBlock | None = None  # None: the block was passed through, and nothing is to be told
    frozen: FrozenBlock | None = None
    fresh: bool = False  # of this run: the record still lacks its cosine and seconds, the journal its entry


# Asked for a block's parameters, it moves x on to the original block's outputs. x̂ is the engine's own affair.
ParameterProvider = Callable[[BlockTask], BlockOutcome | None]
