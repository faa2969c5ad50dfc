"""End-to-end tuning: the scales and vectors of the full quantized model, learned together for its logits.

Blocks are learned one after another, each for its own output. Everything in the checkpoint except the integers can then
be learned for the output of the full model. With fixed q − z, scales s, and norms and biases b,

    θ* minimises the mean over tokens of KL(p(original) ‖ p(θ))        s' = s·θ        b' = b·θ

θ starts at one. s' and b' are rounded as in the checkpoint, so that learning sees the stored values. No integer
changes. (Training only quantization parameters end to end, after the blocks: EfficientQAT, Chen et al. 2024, section 3,
there with labels.)

The original is not needed again: its last block's outputs are the full-precision stream at the end of the block loop,
and the model's own code after the blocks turns them into logits. The backward pass recomputes blocks, so that the
activations of only one are in memory, beside the model's codes. Scales with few bits are too coarse to follow small
steps and stay fixed; vectors are learned there too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lrquant.architectures.block_calls import answering
from lrquant.formats import kernels
from lrquant.losses import means, no_means
from lrquant.passes.definition import Pass
from lrquant.reconstruction.block_optimizer import Batches, learn
from lrquant.reconstruction.block_parameters import FrozenBlock
from lrquant.reconstruction.learnables import Learnables
from lrquant.reconstruction.learnables.end_to_end_factor import EndToEndFactor
from lrquant.reconstruction.result import Tuning
from lrquant.reconstruction.run import Run
from lrquant.runtime.execution import matrix_products

_FACTOR = EndToEndFactor()
_BATCHED = {"input_ids", "pixel_values"}  # arguments of a sample whose first dimension is the batch


@dataclass(frozen=True)
class Whole:
    """A model whose blocks, at `paths`, have their quantized values, and the frozen blocks, on the CPU."""

    model: nn.Module
    paths: Sequence[str]
    frozen: Sequence[FrozenBlock]
    storage_dtype: torch.dtype
    device: torch.device

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.model.get_submodule(path) for path in self.paths]


def tune(run: Run) -> tuple[list[FrozenBlock], Tuning | None]:
    """Tune the scales and vectors of the run's blocks, and give the model their values; also returns the outcome.

    Activations are quantized meanwhile. A model without logits is left unchanged.
    """
    # `mse` stands for a loss of one term, which the divergence is.
    recipe = run.recipe.changed(epochs=run.recipe.tuning_epochs, two_branch=False, dynamic_loss=False, loss="mse")
    samples, ranks, told = run.own_samples, run.machine.ranks, run.callback.tuned
    whole = Whole(run.model, run.result.block_paths, run.result.frozen, run.storage_dtype, run.machine.device)
    with _rest_on_device(whole):
        behind = _behind(whole, samples[0])
        if behind is None:
            return list(whole.frozen), None
        assert run.full_precision is not None
        tuning = _Divergence(whole, samples, run.full_precision, behind=behind, products=recipe.products)
        count = int(ranks.sum(torch.tensor(len(samples))))
        batch = recipe.batch_size if ranks.all(_can_be_joined(samples)) else ranks.world
        with kernels.using(recipe.kernels):
            told(0, recipe.epochs, None)
            learned = learn(
                tuning,
                tuning.start(),
                Batches(count, min(batch, count), ranks),
                recipe=recipe,
                seed=recipe.seed,
                on_epoch=lambda epoch, loss: told(epoch + 1, recipe.epochs, loss),
            )
    tuned = [block.tuned(learned.learnables, index) for index, block in enumerate(tuning.blocks)]
    return tuned, Tuning(learned.initial_loss, learned.final_loss, learned.outcome, learned.epoch_losses)


class _Divergence:
    """The loss of end-to-end tuning: KL(p(original) ‖ p(θ)) on some samples, as `learn` calls it.

    Args:
        samples, originals: calls of the model, and the full-precision model's last hidden states; this rank's.
        behind: what each block returns behind its hidden states (`_behind`).
        products: the precision of matrix products.
    """

    def __init__(
        self,
        whole: Whole,
        samples: Sequence[Mapping[str, Any]],
        originals: Sequence[Tensor],
        *,
        behind: Sequence[tuple[Any, ...] | None],
        products: str,
    ) -> None:
        self._whole, self._samples, self._originals = whole, samples, originals
        self._behind, self._products = behind, products
        self.blocks = [_Tunable(block, frozen, whole) for block, frozen in zip(whole.blocks, whole.frozen, strict=True)]

    def start(self) -> Learnables:
        return {name: tensor for index, block in enumerate(self.blocks) for name, tensor in block.start(index).items()}

    def __call__(self, factors: Learnables, chosen: Sequence[int]) -> Tensor:
        whole = self._whole
        if not chosen:
            return no_means(1, "divergence", whole.device)
        arguments = _joined([self._samples[each] for each in chosen], whole.device)
        last = torch.cat([self._originals[each] for each in chosen]).to(whole.device)

        def original(index: int, _: Any, hidden: Tensor, __: Any) -> Any:
            """Every block returns its input unchanged, except the last, which returns the full-precision output."""
            others = self._behind[index]
            hidden = last if index == len(self.blocks) - 1 else hidden
            return hidden if others is None else (hidden, *others)

        def quantized(index: int, own: Any, hidden: Tensor, named: Mapping[str, Any]) -> Any:
            return self.blocks[index](factors, index, own, hidden=hidden, named=named)

        with matrix_products(self._products, whole.device):
            with torch.no_grad(), answering(whole.blocks, original):
                wanted = whole.model(**arguments).logits
            with answering(whole.blocks, quantized):
                found = whole.model(**arguments).logits
        return means(found, [wanted], "divergence")


class _Tunable:
    """A block's frozen values, on the device: what of them is multiplied by factors, and what stays."""

    def __init__(self, block: nn.Module, frozen: FrozenBlock, whole: Whole) -> None:
        self._frozen, self._storage_dtype = frozen, whole.storage_dtype
        self._block, self._through = block, _Through(block)
        self._dtype = next(block.parameters()).dtype
        self._steps: dict[str, Tensor] = {}  # q − z by linear, (out, groups, group), in one or two bytes
        self._bases: dict[str, Tensor] = {}  # scales by linear, (out, groups, 1), and vectors by name
        for linear, weight in frozen.weights.items():
            if weight.format.scales.follows_steps:
                self._steps[linear] = _compact(weight.steps()).to(whole.device)
                self._bases[f"{linear}.weight"] = weight.scale.float()[..., None].to(whole.device)
        self._bases |= {
            name: tensor.float().to(whole.device)
            for name, tensor in frozen.dense.items()
            if tensor.ndim == 1 and tensor.is_floating_point()
        }
        self._fixed = {
            name: tensor.detach().to(whole.device)
            for name, tensor in (*block.named_parameters(), *block.named_buffers())
            if name not in self._bases
        }

    def start(self, place: int) -> Learnables:
        return _FACTOR.ones(place, self._bases)

    def __call__(self, factors: Learnables, place: int, own: Any, *, hidden: Tensor, named: Mapping[str, Any]) -> Any:
        """The quantized block's answer; `own` is its forward."""

        def answer(hidden: Tensor) -> Any:
            parameters = {f"block.{name}": tensor for name, tensor in self._parameters(factors, place).items()}
            return functional_call(self._through, parameters, (own, hidden, named))

        if not torch.is_grad_enabled():
            return answer(hidden)
        chosen = kernels.chosen()  # in the backward pass, which may be another thread's
        contexts = lambda: (nullcontext(), kernels.using(chosen))  # noqa: E731
        return checkpoint(answer, hidden, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def _parameters(self, factors: Learnables, place: int) -> dict[str, Tensor]:
        products, found = self._frozen.product_dtype, dict(self._fixed)
        for name, base in self._bases.items():
            value = _FACTOR.applied(factors, place, name, base, self._storage_dtype)
            linear = name.removesuffix(".weight")
            if linear in self._steps:
                scale = self._frozen.weights[linear].format.per_row(value.float(), len(self._steps[linear]))
                value = (self._steps[linear].float() * scale).flatten(-2).to(products)
            found[name] = value.to(self._dtype)
        return found

    @torch.no_grad()
    def tuned(self, factors: Learnables, place: int) -> FrozenBlock:
        """The frozen block with `factors` in its scales and vectors, which the block takes on."""
        values = {
            name: _FACTOR.applied(factors, place, name, base, self._storage_dtype).cpu()
            for name, base in self._bases.items()
        }
        weights = {
            linear: weight._replace(scale=values[f"{linear}.weight"].squeeze(-1).to(weight.scale.dtype))
            if linear in self._steps
            else weight
            for linear, weight in self._frozen.weights.items()
        }
        dense = {name: values.get(name, tensor) for name, tensor in self._frozen.dense.items()}
        result = replace(self._frozen, weights=weights, dense=dense)
        parameters = dict(self._block.named_parameters())
        for name, tensor in result.parameters(self._dtype).items():
            parameters[name].copy_(tensor)
        return result


def _compact(steps: Tensor) -> Tensor:
    """`steps` in the fewest bytes that hold them exactly."""
    kinds = (torch.int8, torch.float8_e4m3fn, torch.int16)
    return next((found for kind in kinds if torch.equal((found := steps.to(kind)).float(), steps)), steps)


class _Through(nn.Module):
    """Calls a block's own forward, so that a functional call can replace the block's parameters meanwhile."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, own: Callable[..., Any], hidden: Tensor, named: Mapping[str, Any]) -> Any:
        return own(hidden, **named)


@torch.no_grad()
def _behind(whole: Whole, sample: Mapping[str, Any]) -> list[tuple[Any, ...] | None] | None:
    """What each block returns behind its hidden states (None: it returns no tuple); None: there are no logits."""
    found: list[tuple[Any, ...] | None] = []

    def look(place: int, own: Any, hidden: Tensor, named: Mapping[str, Any]) -> Any:
        block = whole.blocks[place]
        parameters = {f"block.{name}": tensor.to(whole.device) for name, tensor in block.state_dict().items()}
        output = functional_call(_Through(block), parameters, (own, hidden, named))
        found.append(output[1:] if isinstance(output, tuple) else None)
        return output

    with answering(whole.blocks, look):
        answer = whole.model(**_joined([sample], whole.device))
    return found if isinstance(getattr(answer, "logits", None), Tensor) else None


def _can_be_joined(samples: Sequence[Mapping[str, Any]]) -> bool:
    """Whether samples differ in nothing but batched arguments of one shape."""

    def looks(sample: Mapping[str, Any]) -> Any:
        return {name: value.shape if isinstance(value, Tensor) else value for name, value in sample.items()}

    tensors = {name for name, value in samples[0].items() if isinstance(value, Tensor)}
    return tensors <= _BATCHED and all(looks(sample) == looks(samples[0]) for sample in samples)


def _joined(samples: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, Any]:
    """One call's arguments for all `samples`."""
    first = samples[0]
    return {
        name: torch.cat([sample[name] for sample in samples]).to(device)
        if name in _BATCHED
        else value.to(device)
        if isinstance(value, Tensor)
        else value
        for name, value in first.items()
    }


@contextmanager
def _rest_on_device(whole: Whole) -> Iterator[None]:
    """Within, everything but the blocks is on the device."""
    inside = {id(tensor) for block in whole.blocks for tensor in (*block.parameters(), *block.buffers())}
    outside = [
        (tensor, tensor.device)
        for tensor in (*whole.model.parameters(), *whole.model.buffers())
        if id(tensor) not in inside
    ]
    try:
        for tensor, _ in outside:
            tensor.data = tensor.data.to(whole.device)
        yield
    finally:
        for tensor, home in outside:
            tensor.data = tensor.data.to(home)


def _carry_out(run: Run) -> None:
    with run.activations_quantized(len(run.places)):
        run.result.frozen, run.result.tuning = tune(run)


END_TO_END = Pass(
    "end-to-end tuning",
    _carry_out,
    applies=lambda recipe: recipe.tuning_epochs > 0,
    needs_model=True,
    needs_blocks=True,
)
