"""The two streams of hidden states, stage after stage.

    x    what the full-precision model's blocks produce
    x̂    what the already quantized blocks produce

The loop processes a model with several stages (Swin's resolutions, the towers of a multimodal model) stage by stage.
The inputs of a later stage are found by running everything before it: once in full precision before anything is
changed, which starts x, and once with the earlier stages quantized, which starts x̂.
"""

from torch import nn

from lrquant.calibration.activation_cache import Stream
from lrquant.calibration.capture import BlockInputs, capture
from lrquant.loading.original import BlockPlace
from lrquant.reconstruction.block_forward import BlockForward
from lrquant.reconstruction.run import BlockTask, Run
from lrquant.runtime.distributed import Ranks


class Streams:
    """Both streams of the current stage, and the inputs of later stages."""

    full_precision: Stream  # x
    quantized: Stream  # x̂

    def __init__(self, run: Run) -> None:
        self._run = run
        first_of_last = next(place for place in run.places if place.stage is run.original.stages[-1])
        run.block_source.take(first_of_last.path)  # one block shows what blocks return
        self._inputs = [self._captured(place) for place in run.places if place.within == 0]

    def _captured(self, first: BlockPlace) -> BlockInputs:
        run = self._run
        return capture(run.model, first.stage.blocks(run.model), run.own_samples, run.cache.stream)

    def enter(self, first: BlockPlace) -> None:
        """Begin a stage with the block `first`; all blocks before it are finished."""
        run, self.inputs = self._run, self._inputs.pop(0)
        self.full_precision = self.inputs.hidden
        if first.index == 0:
            self.quantized = run.cache.copy(self.full_precision)
        else:
            with run.activations_quantized(first.index):
                self.quantized = self._captured(first).hidden
        self.batch = run.recipe.batch_size if _can_be_batched(self.inputs, run.machine.ranks) else 1

    def task(self, place: BlockPlace, block: nn.Module) -> BlockTask:
        """The task of `block`, which is at `place` of the current stage."""
        machine, all_experts = self._run.machine, self._run.recipe.all_experts
        forward = BlockForward(
            block, place.within, self.inputs, machine.device, self.batch, machine.ranks, all_experts=all_experts
        )
        return BlockTask(self._run, place, block, forward, self.full_precision, self.quantized)


def _can_be_batched(inputs: BlockInputs, ranks: Ranks) -> bool:
    """Whether samples, those of all ranks, may go through a block together."""
    if ranks.alone:
        return inputs.shared()
    mine = inputs.fingerprint()
    return ranks.all(inputs.shared() and ranks.text(mine) == mine)
