"""Run one block on the samples of a stream, with its own weights or with weights that learnables give."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lrquant.architectures.experts import seeing_everything
from lrquant.architectures.targets import experts_alike, linears_of, watched_inputs
from lrquant.calibration.activation_cache import ActivationStore, Stream
from lrquant.calibration.capture import BlockInputs
from lrquant.errors import LrquantError
from lrquant.formats import NumberFormat, Scheme, format_of, kernels
from lrquant.formats.activation_quant import watched_attention
from lrquant.losses import means, no_means
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_optimizer import Batches, Forward
from lrquant.reconstruction.block_parameters import FrozenBlock, quantized_parameters
from lrquant.reconstruction.compiled_block import CompiledBlock
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.input_statistics import InputStatistics
from lrquant.reconstruction.learnables import Learnables
from lrquant.runtime.distributed import ALONE, Ranks
from lrquant.runtime.execution import matrix_products
from lrquant.runtime.profile import timed
from lrquant.transforms.statistics import ChannelStatistics


def split_samples(output: Tensor, samples: int) -> Sequence[Tensor]:
    """One tensor per sample; a lone sample may come without a batch dimension."""
    return [output] if samples == 1 else output.split(1)


@dataclass
class BlockForward:
    """Runs one block on this rank's samples of a stream."""

    block: nn.Module
    index: int
    inputs: BlockInputs
    device: torch.device
    batch: int  # samples of a step, over all ranks
    ranks: Ranks = ALONE
    all_experts: bool = False  # whether experts are calibrated on all tokens
    expert_tokens: dict[str, int] = field(default_factory=dict)  # what each expert saw in the full-precision pass

    @property
    def at_once(self) -> int:
        """Samples of one forward pass."""
        return -(-self.batch // self.ranks.world)

    @property
    def samples(self) -> int:
        """Of all ranks."""
        return int(self.ranks.sum(torch.tensor(len(self.inputs.hidden))))

    @property
    def batches(self) -> Batches:
        return Batches(self.samples, self.batch, self.ranks)

    def _call(
        self,
        stream: Sequence[Tensor] | Mapping[int, Tensor],
        chosen: Sequence[int],
        parameters: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """Output for samples `chosen` of `stream`: (batch, tokens, hidden)."""
        hidden, arguments = self._given(stream, chosen)
        output = functional_call(self.block, dict(parameters or {}), (hidden,), arguments)
        return output[0] if isinstance(output, tuple) else output

    def _given(
        self, stream: Sequence[Tensor] | Mapping[int, Tensor], chosen: Sequence[int]
    ) -> tuple[Tensor, dict[str, Any]]:
        """What the block receives for samples `chosen`: hidden states and arguments."""
        arguments = self.inputs.arguments_of(self.index, chosen[0], len(chosen), device=self.device)
        # Copied even if there is one: a model's own code may write into what it is given.
        return torch.cat([stream[sample] for sample in chosen]).to(self.device), arguments

    def call_one(self, stream: Mapping[int, Tensor], sample: int, parameters: Mapping[str, Tensor] | None) -> Tensor:
        return self._call(stream, [sample], parameters)

    def _batches(self) -> Iterator[list[int]]:
        everything = range(len(self.inputs.hidden))
        for start in range(0, len(everything), self.at_once):
            yield list(everything[start : start + self.at_once])

    def _calibrating(self) -> AbstractContextManager[Mapping[str, Sequence[int]]]:
        """Within, experts see the tokens that they are calibrated on; says which their router chose, if not those."""
        return seeing_everything(self.block) if self.all_experts else nullcontext({})

    @timed("own-branch targets")
    @torch.no_grad()
    def outputs(
        self, stream: Sequence[Tensor], store: ActivationStore, parameters: Mapping[str, Tensor] | None = None
    ) -> Stream:
        """The block's outputs on `stream`, which is not changed; with its own parameters unless others are given."""
        result = store.stream(stream[0])
        for chosen in self._batches():
            for output in split_samples(self._call(stream, chosen, parameters), len(chosen)):
                result.append(output)
        return result

    @timed("full-precision pass and statistics")
    @torch.no_grad()
    def advance_full_precision(self, stream: Stream) -> tuple[dict[str, ChannelStatistics], set[str]]:
        """Replace `stream` by the block's outputs; returns the linears' input statistics and those with flat inputs."""
        seen = InputStatistics(self.block, self.ranks)
        with watched_inputs(linears_of(self.block), seen), self._calibrating() as routed:
            for chosen in self._batches():
                seen.samples = len(chosen)
                for sample, output in zip(
                    chosen, split_samples(self._call(stream, chosen, None), len(chosen)), strict=True
                ):
                    if not torch.isfinite(output).all():
                        raise LrquantError(
                            f"block {self.index} gives NaN or infinite outputs in full precision; try --dtype float32"
                        )
                    stream[sample] = output
        self.expert_tokens = seen.tokens(routed)
        return seen.statistics(self.samples), seen.flat()

    @timed("input statistics")
    @torch.no_grad()
    def static_scales(
        self, stream: Stream, frozen: FrozenBlock, scheme: Scheme, storage_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Calibrated scales, (1,) each, by the names of their tensors, from the largest values that `stream` causes.

        They are of linears' inputs, and of keys and values, in the block `frozen`, within which `scheme` calls linears.
        """
        inputs = format_of(scheme.inputs) if scheme.inputs is not None and scheme.has_static_inputs else None
        cache = None if scheme.kv_cache is None else format_of(scheme.kv_cache)
        if inputs is None and cache is None:
            return {}
        formats: dict[str, NumberFormat] = {}
        most: dict[str, Tensor] = {}

        def see(name: str, values: Tensor) -> None:
            most[name] = torch.maximum(most[name], values.abs().amax())

        def see_cache(name: str, key: Tensor, value: Tensor) -> None:
            assert cache is not None
            for scale, values in ((f"{name}.k_scale", key), (f"{name}.v_scale", value)):
                formats[scale] = cache
                most.setdefault(scale, values.new_zeros(()))
                see(scale, values)

        linears = scheme.chosen(linears_of(self.block)) if inputs is not None else {}
        names = {name: f"{name}.input{inputs.scales.global_name}" for name in linears if inputs is not None}
        for name, scale in names.items():
            assert inputs is not None
            formats[scale], most[scale] = inputs, linears[name].weight.new_zeros(())
        parameters = dict(frozen.parameters(next(self.block.parameters()).dtype))
        before_rounding = watched_inputs(linears, lambda name, x: see(names[name], x), first=True)
        of_cache = nullcontext() if cache is None else watched_attention(self.block, see_cache)
        with self._calibrating(), before_rounding, of_cache:
            for chosen in self._batches():
                self._call(stream, chosen, parameters)
        found = {name: self.ranks.most(largest) for name, largest in most.items()}
        for together in experts_alike(self.block) if names else ():  # one that saw no token has the others' scale
            same = [name for name in together if name in names]
            if not same:
                continue
            largest = torch.stack([found[names[name]] for name in same]).amax()
            found |= {names[name]: largest for name in same if not found[names[name]]}
        scales = {name: formats[name].global_scale(largest, storage_dtype) for name, largest in found.items()}
        return {name: scale.cpu() for name, scale in scales.items() if scale is not None}

    @timed("advance")
    @torch.no_grad()
    def advance(self, stream: Stream, targets: Sequence[Tensor]) -> float:
        """Replace `stream` by the block's outputs; returns their mean cosine similarity to `targets`."""
        total = 0.0
        for chosen in self._batches():
            for sample, output in zip(
                chosen, split_samples(self._call(stream, chosen, None), len(chosen)), strict=True
            ):
                if not torch.isfinite(output).all():
                    raise LrquantError(
                        f"block {self.index} gives NaN or infinite outputs after quantization; try --dtype float32"
                    )
                stream[sample] = output
                target = targets[sample].to(output.device)
                total += float(torch.nn.functional.cosine_similarity(output.float(), target.float(), dim=-1).mean())
        if self.ranks.alone:
            return total / len(stream)
        total, samples = self.ranks.sum(torch.tensor([total, len(stream)], dtype=torch.float64)).tolist()
        return total / samples

    @timed("input statistics")
    @torch.no_grad()
    def second_moments(self, stream: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """XᵀX (in, in) of every linear's inputs, as the linear sees them, in the block with `parameters`.

        Linears that share an input share the tensor. Experts that see no token have zeros.
        """
        moments: dict[str, Tensor] = {}
        latest: list[Any] = [None, None]  # an input, and the linear whose moments it went into

        def seen(name: str, x: Tensor) -> None:
            if latest[0] is x:
                moments[name] = moments[latest[1]]
                return
            rows = x.reshape(-1, x.shape[-1]).float()
            if name in moments:
                moments[name].addmm_(rows.T, rows)
            else:
                moments[name] = rows.T @ rows
            latest[:] = x, name

        with watched_inputs(linears_of(self.block), seen), self._calibrating():
            for chosen in self._batches():
                self._call(stream, chosen, parameters)
        missing = {name: linear for name, linear in linears_of(self.block).items() if name not in moments}
        moments |= {
            name: torch.zeros(2 * (linear.in_features,), device=self.device) for name, linear in missing.items()
        }
        if experts_alike(self.block) and not self.ranks.alone:  # what shares an input here may not have one elsewhere
            return {name: self.ranks.sum(moments[name]) for name in sorted(moments)}
        distinct = {id(tensor): tensor for tensor in moments.values()}
        summed = {key: self.ranks.sum(tensor) for key, tensor in distinct.items()}
        return {name: summed[id(tensor)] for name, tensor in moments.items()}

    def forward_function(
        self,
        fixed: BlockParameters,
        stream: Sequence[Tensor],
        targets: Sequence[Sequence[Tensor]],
        *,
        recipe: Recipe,
        graph: CompiledBlock | None = None,
    ) -> Forward:
        """The quantized block as `learn` calls it; targets stay on the streams' device until they are needed."""
        dtype = next(self.block.parameters()).dtype
        product = torch.bfloat16 if recipe.products == "bfloat16" else dtype

        def parameters(learnables: Learnables) -> Mapping[str, Tensor]:
            return quantized_parameters(fixed, learnables, dtype, product)

        plain = self.loss_of(parameters, stream, targets, recipe=recipe)

        def forward(learnables: Learnables, chosen: Sequence[int]) -> Tensor:
            if chosen and graph is not None and graph.works and len(chosen) == self.at_once:
                wanted = self._wanted(targets, chosen)
                found = graph(self.block, fixed, learnables, *self._given(stream, chosen), wanted)
                if found is not None:
                    return found
            plainly = kernels.using("eager") if graph is not None and graph.works else nullcontext()  # a few calls
            with plainly:
                return plain(learnables, chosen)

        return forward

    def loss_of(
        self,
        parameters: Callable[[Learnables], Mapping[str, Tensor]],
        stream: Sequence[Tensor],
        targets: Sequence[Sequence[Tensor]],
        *,
        recipe: Recipe,
    ) -> Forward:
        """The terms of the recipe's loss for the block with `parameters` from learnables, as `learn` calls it."""

        def forward(learnables: Learnables, chosen: Sequence[int]) -> Tensor:
            if not chosen:
                return no_means(len(targets), recipe.loss, self.device)
            with matrix_products(recipe.products, self.device):
                output = self._call(stream, chosen, parameters(learnables))
            return means(output, self._wanted(targets, chosen), recipe.loss)

        return forward

    def fixed_function(
        self,
        parameters: Mapping[str, Tensor],
        stream: Sequence[Tensor],
        targets: Sequence[Sequence[Tensor]],
        *,
        loss: str,
    ) -> Forward:
        """The block with fixed `parameters`, in the form of `forward_function`."""
        here = {name: tensor.to(self.device) for name, tensor in parameters.items()}

        def forward(_: Learnables, chosen: Sequence[int]) -> Tensor:
            if not chosen:
                return no_means(len(targets), loss, self.device)
            return means(self._call(stream, chosen, here), self._wanted(targets, chosen), loss)

        return forward

    def _wanted(self, targets: Sequence[Sequence[Tensor]], chosen: Sequence[int]) -> list[Tensor]:
        tensors = [[branch[sample] for sample in chosen] for branch in targets]
        return [(each[0] if len(each) == 1 else torch.cat(each)).to(self.device) for each in tensors]
