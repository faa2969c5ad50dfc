"""Successive blocks reconstructed together, as one window: `recipe.window` of them, sliding on by all but the overlap.

    window 2, overlap 0      [0 1] [2 3] [4 5]      every block is learned once, for the output of its pair
    window 2, overlap 1      [0 1]                  block 0 stays as it is learned here
                               [1 2]                block 1 goes on from what it was, and stays
                                 [2 3] …

The blocks after it decide how much a block's error matters, and later weights can compensate for errors of earlier
ones. (Sliding windows of blocks: CBQ, Ding et al. 2023, section 3.2.) The loss is that of the last block's output:

    θ* minimises loss( f_{i+w−1} ∘ … ∘ f_i (x̂; W(θ_i), …, W(θ_{i+w−1})), targets )

Each block is first learned by itself. The window starts from there, with a tenth of the learning rates, so it ends no
worse.

The block loop does not know about windows: a window is two providers of parameters (reconstruction/run.py). When the
loop reaches the first block of a window, all of its blocks are learned; the others receive their parameters later.
Checkpoints and journals hold single blocks as usual, and the records of a window's blocks have its losses. A window
never spans two stages. A resumed run continues with complete windows, and with the learnables that the last one left
for the next (`FinishedBlock.carried`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrquant.calibration.activation_cache import Stream
from lrquant.calibration.capture import BlockInputs
from lrquant.formats import kernels
from lrquant.formats.activation_quant import quantized_activations
from lrquant.loading.original import BlockPlace
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_forward import BlockForward
from lrquant.reconstruction.block_optimizer import Learned, learn
from lrquant.reconstruction.block_parameters import quantized_parameters
from lrquant.reconstruction.block_reconstruction import Begun, Learn, restore
from lrquant.reconstruction.learnables import Learnables
from lrquant.reconstruction.learnables.rates import clipping_rate, rounding_rate, smoothing_rate
from lrquant.reconstruction.rounding import Problem, solve
from lrquant.reconstruction.run import BlockOutcome, BlockTask, ParameterProvider

RATE_SHARE = 0.1  # of the rates with which blocks learn by themselves


def providers_of(recipe: Recipe, learn: Learn) -> Sequence[ParameterProvider]:
    """The providers of a run: the journal, then `learn`, block by block or in the recipe's windows."""
    if recipe.window == 1:
        return restore, learn
    windows = LearnWindows(learn, recipe.window, recipe.window_overlap)
    return windows.restore, windows.provide


class BlockWindow(nn.Module):
    """Successive blocks as one module: each receives its own arguments and the output of the block before it."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden: Tensor, arguments: Sequence[Mapping[str, Any]]) -> Tensor:  # (batch, tokens, hidden)
        for block, named in zip(self.blocks, arguments, strict=True):
            output = block(hidden, **named)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden


@dataclass
class WindowInputs(BlockInputs):
    """Inputs of `count` successive blocks of a stage, beginning with any of them."""

    count: int = 1

    def arguments_of(self, block: int, sample: int, batch: int, *, device: torch.device) -> dict[str, Any]:
        """Arguments of a window that begins with `block`."""
        each = [
            super(WindowInputs, self).arguments_of(block + n, sample, batch, device=device) for n in range(self.count)
        ]
        return {"arguments": each}


def windows_of(blocks: int, size: int, overlap: int) -> list[tuple[range, range]]:
    """(blocks learned together, those of them that stay as they are learned) of every window over a stage's blocks.

    >>> windows_of(4, 2, 1)
    [(range(0, 2), range(0, 1)), (range(1, 3), range(1, 2)), (range(2, 4), range(2, 4))]
    """
    found, first = [], 0
    while first < blocks:
        last = min(first + size, blocks)
        stays = range(first, last if last == blocks else last - overlap)
        found.append((range(first, last), stays))
        first = stays.stop
    return found


@dataclass
class LearnWindows:
    """Two providers of a block's parameters, `restore` and `provide`, for windows of `size` blocks with an `overlap`.

    `learn` prepares and finishes every block; in between, a block is learned by itself and then with its window.
    """

    learn: Learn
    size: int
    overlap: int = 0
    _begun: dict[int, Begun] = field(default_factory=dict)  # of blocks whose turn is to come
    _learned: dict[int, Learned] = field(default_factory=dict)  # likewise, where they stay as they are learned
    _carried: Learnables = field(default_factory=dict)  # `block index.owner.part`: what a window goes on from

    def restore(self, task: BlockTask) -> BlockOutcome | None:
        """The block as an earlier run finished it, if that run finished the complete window; otherwise None."""
        _, stays = self._window(task)
        if not all(task.run.journal.finished(place.index) for place in stays):
            return None
        outcome = restore(task)
        if outcome is not None and outcome.finished is not None and outcome.finished.carried:
            device = task.run.machine.device
            self._carried = {name: tensor.to(device) for name, tensor in outcome.finished.carried.items()}
        return outcome

    def provide(self, task: BlockTask) -> BlockOutcome:
        """The parameters that the block's window has learned for it."""
        index, (_, stays) = task.place.index, self._window(task)
        if index not in self._learned:
            self._learn_together(task)
        task.forward.advance_full_precision(task.full_precision)
        outcome = self.learn.finish(task, self._begun.pop(index), self._learned.pop(index))
        if index == stays[-1].index and outcome.finished is not None:
            outcome.finished.carried = {name: tensor.cpu() for name, tensor in self._carried.items()}
        return outcome

    def _window(self, task: BlockTask) -> tuple[Sequence[BlockPlace], Sequence[BlockPlace]]:
        """The window that the block stays as: its blocks, and those of them that stay."""
        places = [place for place in task.run.places if place.stage is task.place.stage]
        found = windows_of(len(places), self.size, self.overlap)
        together, stays = next(window for window in found if task.place.within in window[1])
        return [places[within] for within in together], [places[within] for within in stays]

    def _learn_together(self, task: BlockTask) -> None:
        """Learn the window that begins with the block of `task`; x and x̂ do not advance."""
        run, inputs, machine = task.run, task.forward.inputs, task.run.machine
        window, stays = self._window(task)
        # Where a block was found damaged after those before it were restored, the window begins with that block.
        window = [place for place in window if place.index >= task.place.index]
        blocks: list[nn.Module] = [
            task.block,
            *(run.block_source.take(place.path).to(machine.device) for place in window[1:]),
        ]
        forwards = [
            replace(task.forward, block=block, index=place.within) for block, place in zip(blocks, window, strict=True)
        ]
        together = BlockForward(
            BlockWindow(blocks),
            task.place.within,
            WindowInputs(inputs.hidden, inputs.arguments, len(blocks)),
            machine.device,
            task.forward.batch,
            machine.ranks,
        )
        own_targets = [together.outputs(task.quantized, run.cache)] if run.recipe.two_branch else []
        ahead: Stream = run.cache.copy(task.full_precision)
        quantized = task.quantized
        for place, block, forward in zip(window, blocks, forwards, strict=True):
            each = BlockTask(run, place, block, forward, ahead, quantized)
            self._learn_alone(each)
            if place is not window[-1]:
                quantized = self._outputs(each)
        learned = self._solved(together, window, task=task, targets=[ahead, *own_targets])
        apart = {place.index: _within(learned.learnables, f"{place.index}.") for place in window}
        self._learned = {
            place.index: replace(learned, learnables=apart[place.index]) for place in stays if place in window
        }
        self._carried = {
            f"{place.index}.{name}": tensor
            for place in window
            if place not in stays
            for name, tensor in apart[place.index].items()
        }

    def _learn_alone(self, task: BlockTask) -> None:
        """The learnables with which the block enters its window. Advances the task's x.

        A block that another window has already learned continues from there.
        """
        run, index, forward = task.run, task.place.index, task.forward
        if index in self._begun:
            forward.advance_full_precision(task.full_precision)
            return
        own_targets = [forward.outputs(task.quantized, run.cache)] if run.recipe.two_branch else []
        begun = self._begun[index] = self.learn.begin(task)
        if _within(self._carried, f"{index}."):  # as the journal has it
            return
        problem = Problem(index, begun.fixed, begun.start, task.quantized, [task.full_precision, *own_targets])
        with self.learn.rounding(task, begun):
            learned = solve(
                forward, problem, recipe=run.recipe, compiled=run.compiled, on_epoch=run.callback.epoch_done
            )
        self._carried |= {f"{index}.{name}": tensor for name, tensor in learned.learnables.items()}

    @torch.no_grad()
    def _outputs(self, task: BlockTask) -> Stream:
        """The quantized block's outputs, as it goes into its window."""
        index, begun = task.place.index, self._begun[task.place.index]
        parameters = quantized_parameters(
            begun.fixed, _within(self._carried, f"{index}."), next(task.block.parameters()).dtype
        )
        with self.learn.rounding(task, begun):
            return task.forward.outputs(task.quantized, task.run.cache, parameters)

    def _solved(
        self,
        together: BlockForward,
        window: Sequence[BlockPlace],
        *,
        task: BlockTask,
        targets: Sequence[Sequence[Tensor]],
    ) -> Learned:
        run, recipe = task.run, self._gently(task)
        start = {
            name: tensor
            for place in window
            for name, tensor in self._carried.items()
            if name.startswith(f"{place.index}.")
        }
        with ExitStack() as rounding:
            for place, block in zip(window, together.block.get_submodule("blocks").children(), strict=True):
                input_args = run.input_args(block, place.path, self._begun[place.index].flat_inputs)
                rounding.enter_context(quantized_activations(block, input_args, run.attention_scheme))
            rounding.enter_context(kernels.using(recipe.kernels))
            return learn(
                together.loss_of(
                    self._parameters(together, window, recipe.products), task.quantized, targets, recipe=recipe
                ),
                start,
                together.batches,
                recipe=recipe,
                seed=recipe.seed + task.place.index,
                on_epoch=lambda epoch, loss: run.callback.epoch_done(task.place.index, recipe.epochs + epoch, loss),
            )

    def _gently(self, task: BlockTask) -> Recipe:
        """The recipe with the lower learning rates of a window, whose blocks have been learned before."""
        recipe, batch = task.run.recipe, task.forward.batch
        steps = max(1, recipe.epochs * -(-task.forward.samples // batch))
        return recipe.changed(
            let_lr=RATE_SHARE * smoothing_rate(recipe, steps),
            lwc_lr=RATE_SHARE * clipping_rate(recipe, steps),
            rounding_lr=RATE_SHARE * rounding_rate(recipe, steps),
        )

    def _parameters(
        self, together: BlockForward, window: Sequence[BlockPlace], products: str
    ) -> Callable[[Learnables], dict[str, Tensor]]:
        """From a window's learnables to the parameters of all its blocks."""
        dtype = next(together.block.parameters()).dtype
        product = torch.bfloat16 if products == "bfloat16" else dtype
        fixed = {place.index: self._begun[place.index].fixed for place in window}

        def parameters(learnables: Learnables) -> dict[str, Tensor]:
            return {
                f"blocks.{n}.{name}": tensor
                for n, index in enumerate(fixed)
                for name, tensor in quantized_parameters(
                    fixed[index], _within(learnables, f"{index}."), dtype, product
                ).items()
            }

        return parameters


def _within(learnables: Mapping[str, Tensor], prefix: str) -> Learnables:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in learnables.items() if name.startswith(prefix)}
