"""A block's turn in the loop: it is on the device, has the original's weights, and both streams hold what it receives.

At the end of its turn it holds its quantized values, and both streams hold what it has answered.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from lrquant.calibration.activation_cache import ActivationStore, Stream
from lrquant.errors import UsageError
from lrquant.formats import format_of, kernels
from lrquant.formats.activation_quant import quantized_activations, set_global_scale
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_event import BlockDecision, BlockEvent
from lrquant.reconstruction.block_forward import BlockForward
from lrquant.reconstruction.block_optimizer import or_present
from lrquant.reconstruction.block_parameters import FrozenBlock, freeze
from lrquant.reconstruction.block_preparation import check_fits, linear_input_args
from lrquant.reconstruction.callbacks import Callback
from lrquant.reconstruction.compiled_block import CompiledBlocks
from lrquant.reconstruction.initial_state import begin
from lrquant.reconstruction.journal import FinishedBlock
from lrquant.reconstruction.learnables import Learnables
from lrquant.reconstruction.records import BlockRecord
from lrquant.reconstruction.result import Present
from lrquant.reconstruction.rounding import solve
from lrquant.runtime.distributed import Ranks
from lrquant.transforms import Equivalence
from lrquant.transforms.bias_slots import add_bias_slots, missing_biases
from lrquant.transforms.statistics import ChannelStatistics


@dataclass(frozen=True)
class Run:
    """What holds for every block."""

    recipe: Recipe
    device: torch.device
    storage_dtype: torch.dtype
    attention_args: QuantizationArgs | None
    store: ActivationStore
    graphs: CompiledBlocks
    callback: Callback
    ranks: Ranks
    samples: int  # of all ranks
    given_statistics: Sequence[dict[str, ChannelStatistics]] | None
    start_from: Sequence[Learnables] | None
    present: Present | None


@dataclass
class BlockReconstruction:
    """One block and the two streams."""

    place: int
    path: str
    block: nn.Module
    equivalences: Sequence[Equivalence]
    calls: BlockForward
    full_precision: Stream  # x
    quantized: Stream  # x̂
    run: Run
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.view = BlockEvent(
            self.place, self.path, self.block, self.calls.call_one, self.full_precision, self.quantized
        )
        self.run.callback.block_begins(self.view)

    def pass_through(self, parameters: Mapping[str, Tensor], input_scales: Mapping[str, Tensor]) -> set[str]:
        """The block takes on `parameters` as they are; returns its linears with flat inputs."""
        _, flat = self.calls.advance_full_precision(self.full_precision)
        self._advance(parameters, input_scales, flat)
        return flat

    def learn(self) -> tuple[FinishedBlock, FrozenBlock]:
        """The block takes on what it learns, or what it presently is, where that answers better."""
        run, recipe = self.run, self.run.recipe
        own_targets = self.calls.outputs(self.quantized, run.store) if recipe.two_branch else None
        statistics, flat = self.calls.advance_full_precision(self.full_precision)
        if run.given_statistics is not None:
            given = run.given_statistics[self.place]
            statistics = {name: value.to(run.device) for name, value in given.items()}
        fixed, start, slots = begin(
            self.block, self.path, self.place, self.equivalences, statistics, recipe, run.storage_dtype
        )
        if run.start_from is not None:
            start = _checked_start(start, run.start_from[self.place], self.place, run.device)
        input_args = linear_input_args(self.block, recipe.scheme.inputs, recipe, flat)
        with quantized_activations(self.block, input_args, run.attention_args), kernels.using(recipe.kernels):
            targets = [self.full_precision] if own_targets is None else [self.full_precision, own_targets]
            told = run.callback.epoch_done
            learned = solve(self.calls, fixed, start, self.quantized, targets, recipe, run.graphs, self.place, told)
            if run.present is not None:
                now = self.calls.fixed_function(run.present.blocks[self.place], self.quantized, targets, recipe.loss)
                learned = or_present(learned, now, run.samples, self.calls.batch, run.ranks)
            frozen = freeze(fixed, learned.learnables)
            if recipe.scheme.inputs is not None and recipe.scheme.has_static_inputs:
                format = format_of(recipe.scheme.inputs)
                scales = self.calls.input_scales(self.quantized, frozen, format, run.storage_dtype)
                frozen = replace(frozen, input_scales=scales)
        if learned.outcome == "kept present":
            assert run.present is not None
            cosine = self._advance(run.present.blocks[self.place], run.present.scales(self.place), flat)
        else:
            check_fits(frozen, self.path, run.storage_dtype)
            decided = BlockDecision(fixed, start, learned.learnables, frozen, input_args, run.attention_args)
            run.callback.block_decided(self.view, decided)
            dtype = next(self.block.parameters()).dtype
            cosine = self._advance(frozen.parameters(dtype), frozen.input_scales, flat)
        record = BlockRecord(
            self.place,
            learned.initial_loss,
            learned.final_loss,
            learned.outcome,
            learned.epoch_losses,
            learned.recoveries,
            time.perf_counter() - self.began,
            cosine,
            learned.epochs_left,
        )
        finished = FinishedBlock(
            {name: tensor.cpu() for name, tensor in learned.learnables.items()},
            {name: value.to(torch.device("cpu")) for name, value in statistics.items()},
            record,
            tuple(sorted(flat)),
            tuple(slots),
            {name: scale.clone() for name, scale in frozen.input_scales.items()},  # files hold no tensor twice
        )
        return finished, frozen

    def _advance(self, parameters: Mapping[str, Tensor], input_scales: Mapping[str, Tensor], flat: set[str]) -> float:
        """The block takes on `parameters`, and x̂ its answer; returns the mean cosine between the streams."""
        _replace(self.block, parameters)
        for name, scale in input_scales.items():  # from now on
            set_global_scale(self.block.get_submodule(name), scale)
        input_args = linear_input_args(self.block, self.run.recipe.scheme.inputs, self.run.recipe, flat)
        with quantized_activations(self.block, input_args, self.run.attention_args):
            cosine = self.calls.advance(self.quantized, self.full_precision)
        self.run.callback.block_ends(self.view)
        return cosine


@torch.no_grad()
def _replace(block: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give `block` the parameters `values`; biases that it lacks are added."""
    biases = [name.removesuffix(".bias") for name in values if name.endswith(".bias")]
    add_bias_slots(block, missing_biases(block, biases))
    parameters = dict(block.named_parameters())
    for name, tensor in values.items():
        parameters[name].copy_(tensor)


def _checked_start(start: Learnables, given: Learnables, place: int, device: torch.device) -> Learnables:
    """`given` in place of `start`, when it is the same learnables of the same shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in start.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in given.items()}:
        odd = sorted(shapes.keys() ^ given.keys()) or [name for name in shapes if shapes[name] != given[name].shape]
        raise UsageError(
            f"the saved parameters of block {place} do not fit this model and recipe ({odd[0]}, …); "
            f"use the options that they were learned with"
        )
    return {name: given[name].to(device) for name in start}
