"""Measures every block during reconstruction, on a few samples.

It draws no random numbers and does not change the run: a checkpoint has the same bytes with and without it. It costs
about twenty calls of each block on about a thousand tokens, a few percent of learning the block.

Measurements (float16 tensors), by name:

    {block}|{layer}|channels_before, _after    largest magnitude per channel of the layer's input; at most 512 channels
    {block}|{layer}|map_before, _after         the same per channel and token, (tokens ≤ 48, channels ≤ 128)
    {block}|{layer}|histogram                  the transformed weight over its group's largest magnitude, 81 bins
    {block}|{layer}|clip                       kept ends of the range: 10th percentile, mean, 90th; low end, high end
    {block}|{transformation}|scale_start, _end
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lrquant.architectures.every_expert import name_in_every_expert
from lrquant.architectures.targets import experts_alike, linears_of, watched_inputs
from lrquant.formats.activation_quant import quantized_activations
from lrquant.reconstruction.block_event import BlockDecision, BlockEvent
from lrquant.reconstruction.block_parameters import quantized_parameters, transformed_parameters
from lrquant.reconstruction.callbacks import Callback
from lrquant.reconstruction.learnables import Learnables
from lrquant.reconstruction.learnables.clipping import Clipping
from lrquant.reconstruction.learnables.smoothing import Smoothing
from lrquant.reconstruction.records import BlockRecord
from lrquant.report.block_files import keep_block, kept_block
from lrquant.report.run import Block, Error, Errors, LinearInput, Sensitivity
from lrquant.runtime.profile import timed

MOST_TOKENS, MOST_SAMPLES = 1024, 4  # that are looked at
MOST_CHANNELS = 512
MAP_SHAPE = (48, 128)  # tokens, channels
HISTOGRAM_BINS, HISTOGRAM_EDGE = 81, 1.0

Stream = dict[int, Tensor]


@dataclass
class _Begun:
    """What a block that is under way received."""

    index: int
    x: Stream
    x_hat: Stream
    block: Block | None = None


class Observer(Callback):
    """Fills `blocks` and `measurements` while `reconstruct` runs."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.measurements: dict[str, Tensor] = {}
        self.looked_at = ""
        self._begun: _Begun | None = None
        self._folder: Path | None = None

    def run_folder(self, folder: Path) -> None:
        self._folder = folder

    @timed("report")
    def block_begins(self, view: BlockEvent) -> None:
        chosen = choose_samples(view.full_precision)
        tokens = sum(view.full_precision[sample].shape[:-1].numel() for sample in chosen)
        self.looked_at = f"{len(chosen)} calibration samples, {tokens} tokens"
        self._begun = _Begun(view.index, _part(view.full_precision, chosen), _part(view.quantized, chosen))

    @timed("report")
    def block_decided(self, view: BlockEvent, decided: BlockDecision) -> None:
        if self._begun is None or self._begun.index != view.index:
            return
        x, x_hat = self._begun.x, self._begun.x_hat
        block = Block(index=view.index, path=view.path, outcome="", errors=Errors())
        self._look(_Looking(view, decided, x, x_hat, _part(view.full_precision, list(x))), block)
        self._begun.block = block

    @timed("report")
    def block_ends(self, view: BlockEvent) -> None:
        if self._begun is None or self._begun.index != view.index:
            return
        block = self._begun.block
        if block is None:
            block = Block(index=view.index, path=view.path, outcome="not relearned", errors=Errors())
        assert block.errors is not None
        block.errors.end = mean_error((view.quantized[sample], view.full_precision[sample]) for sample in self._begun.x)
        self.blocks.append(block)
        if self._folder is not None and self._begun.block is not None:
            own = {name: tensor for name, tensor in self.measurements.items() if name.startswith(f"{block.index}|")}
            keep_block(self._folder, block, own, looked_at=self.looked_at)
        self._begun = None

    def block_done(self, record: BlockRecord) -> None:
        if not self.blocks or self.blocks[-1].index != record.index:  # a resumed run did not even pass through it
            self.blocks.append(Block(index=record.index, path=f"block {record.index}", outcome=record.outcome))
        if not self.blocks[-1].sensitivity and record.outcome != "kept present":
            self.blocks[-1] = self._restored(self.blocks[-1])
        block = self.blocks[-1]
        block.outcome, block.recoveries, block.seconds = record.outcome, record.recoveries, record.seconds
        block.initial_loss, block.final_loss = record.initial_loss, record.final_loss
        block.epoch_losses = record.epoch_losses

    def _restored(self, passed: Block) -> Block:
        """A block that an interrupted run finished, with what that run measured of it, where that is still there."""
        kept = kept_block(self._folder, passed.index) if self._folder is not None else None
        if kept is None:
            passed.restored = True
            return passed
        entry, measurements = kept
        self.measurements |= measurements
        self.looked_at = self.looked_at or entry.looked_at
        return entry.block.model_copy(update={"restored": True})

    @torch.no_grad()
    def _look(self, looking: "_Looking", block: Block) -> None:
        decided, errors = looking.decided, block.errors
        assert errors is not None
        smoothing_start, smoothing = Smoothing().of(decided.start), Smoothing().of(decided.learned)
        errors.inherited = looking.error(looking.x_hat, looking.original())
        errors.own = looking.quantized_error(looking.x, looking.final())
        errors.plain = looking.quantized_error(looking.x_hat, looking.rounded({}))
        if smoothing_start:
            errors.smoothing_start = looking.quantized_error(looking.x_hat, looking.rounded(smoothing_start))
        if decided.start:
            errors.start = looking.quantized_error(looking.x_hat, looking.rounded(decided.start))
        if smoothing and not _same(smoothing, smoothing_start):
            errors.smoothing_learned = looking.quantized_error(looking.x_hat, looking.rounded(smoothing))
        block.sensitivity = looking.sensitivities(bool(decided.learned))
        block.inputs = self._look_at_inputs(looking, bool(smoothing))
        first = Smoothing().scales(smoothing_start)
        scales = Smoothing().scales(smoothing)
        for transformation in _shown(scales):
            key = f"{block.index}|{transformation}|scale"
            self._keep(f"{key}_start", _thinned(first[transformation]))
            self._keep(f"{key}_end", _thinned(scales[transformation]))
        self._look_at_weights(looking)

    def _look_at_inputs(self, looking: "_Looking", smoothed: bool) -> list[LinearInput]:
        """Channel maxima of every distinct input, and a heat map of the one with the strongest outliers."""
        before, shared = looking.linear_inputs(looking.original())
        after = looking.linear_inputs(looking.transformed())[0] if smoothed else {}
        found = []
        for layer, rows in before.items():
            kept = LinearInput(layers=shared[layer], outlier_ratio=outlier_ratio(rows))
            self._keep(f"{looking.view.index}|{layer}|channels_before", _pooled(rows.abs(), (1, MOST_CHANNELS))[0])
            if layer in after:
                kept.smoothed_outlier_ratio = outlier_ratio(after[layer])
                pooled = _pooled(after[layer].abs(), (1, MOST_CHANNELS))[0]
                self._keep(f"{looking.view.index}|{layer}|channels_after", pooled)
            found.append(kept)
        if not found:
            return []
        strongest = max(found, key=lambda kept: kept.outlier_ratio).layers[0]
        for name, inputs in (("map_before", before), ("map_after", after)):
            if strongest in inputs:
                self._keep(f"{looking.view.index}|{strongest}|{name}", _pooled(inputs[strongest].abs(), MAP_SHAPE))
        return found

    def _look_at_weights(self, looking: "_Looking") -> None:
        """Weight histograms as the number format sees them, and how much of their range clipping keeps."""
        if looking.decided.fixed.format is None:
            return
        weights = looking.transformed()
        for layer in looking.shown:
            weight, format = weights[f"{layer}.weight"], looking.decided.fixed.format_of(layer)
            groups = weight.unflatten(-1, (format.groups(weight.shape[-1]), -1)).float()
            relative = groups / groups.abs().amax(-1, keepdim=True).clamp_min(1e-12)
            edge = HISTOGRAM_EDGE * (1 + 1e-6)
            counts = torch.histc(relative, HISTOGRAM_BINS, -edge, edge)
            self._keep(f"{looking.view.index}|{layer}|histogram", counts / counts.sum())
            shares = Clipping().kept(looking.decided.learned, layer)
            if shares is not None:
                low, high = (format.per_row(share, len(weight)) for share in shares)
                kept = [
                    torch.stack([part.quantile(0.1), part.mean(), part.quantile(0.9)])
                    for part in (
                        (relative.amin(-1, keepdim=True).clamp(max=0) * low).flatten(),
                        (relative.amax(-1, keepdim=True).clamp(min=0) * high).flatten(),
                    )
                ]
                self._keep(f"{looking.view.index}|{layer}|clip", torch.stack(kept))

    def _keep(self, name: str, values: Tensor) -> None:
        self.measurements[name] = values.detach().float().clamp(-6e4, 6e4).half().cpu().contiguous()


class _Looking:
    """One block, its few samples, and the parameter sets that are tried on them."""

    def __init__(self, view: BlockEvent, decided: BlockDecision, x: Stream, x_hat: Stream, truth: Stream) -> None:
        self.view, self.decided, self.x, self.x_hat, self.truth = view, decided, x, x_hat, truth
        self.dtype = next(view.block.parameters()).dtype
        self.shown = shown_linears(view.block, decided.fixed.linears)

    def original(self) -> dict[str, Tensor]:
        return {name: tensor.to(self.dtype) for name, tensor in self.decided.fixed.tensors.items()}

    def transformed(self) -> dict[str, Tensor]:
        """The learned equivalent transformation in full precision: the same function as the original's."""
        written = transformed_parameters(self.decided.fixed, self.decided.learned)
        return {name: tensor.to(self.dtype) for name, tensor in written.items()}

    def rounded(self, learnables: Learnables) -> dict[str, Tensor]:
        return quantized_parameters(self.decided.fixed, learnables, self.dtype)

    def final(self) -> dict[str, Tensor]:
        return dict(self.decided.frozen.parameters(self.dtype))

    def error(self, stream: Stream, parameters: Mapping[str, Tensor]) -> Error:
        pairs = ((self.view.call(stream, sample, parameters), self.truth[sample]) for sample in stream)
        return mean_error(pairs)

    def quantized_error(self, stream: Stream, parameters: Mapping[str, Tensor]) -> Error:
        """With the activations quantized as the run does."""
        with quantized_activations(self.view.block, self.decided.input_args, self.decided.attention_scheme):
            return self.error(stream, parameters)

    def sensitivities(self, transformed: bool) -> list[Sensitivity]:
        """Each linear alone, weight and input, in the original block and in the block as it was learned."""
        plain = self._one_by_one(self.original(), self.rounded({}))
        final = self._one_by_one(self.transformed(), self.final()) if transformed else {}
        return [Sensitivity(layer=layer, plain=plain[layer], final=final.get(layer)) for layer in plain]

    def _one_by_one(self, exact: Mapping[str, Tensor], rounded: Mapping[str, Tensor]) -> dict[str, float]:
        linears = linears_of(self.view.block)
        errors = {}
        for layer, together in self.shown.items():
            parameters = dict(exact) | {f"{name}.weight": rounded[f"{name}.weight"] for name in together}
            inputs = {linears[name]: self.decided.input_args.get(linears[name]) for name in together}
            with quantized_activations(self.view.block, inputs, None):
                errors[layer] = self.error(self.x, parameters).relative
        return errors

    def linear_inputs(self, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
        """Distinct inputs of linears on one sample, (tokens, channels), by their first reader; all their readers."""
        inputs: dict[str, Tensor] = {}
        readers: dict[str, list[str]] = {}
        linears = linears_of(self.view.block)
        with watched_inputs({name: linears[name] for name in self.shown}, inputs.setdefault):
            first = next(iter(self.x))
            self.view.call(self.x, first, parameters)
        for layer, tensor in inputs.items():
            owner = next((other for other in readers if inputs[other] is tensor), layer)
            readers.setdefault(owner, []).append(layer)
        return {owner: inputs[owner].flatten(0, -2).float() for owner in readers}, readers


def shown_linears(block: nn.Module, quantized: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Linears that are looked at one by one → those that are rounded with each: of experts the first stands for all."""
    experts = (tuple(name for name in same if name in quantized) for same in experts_alike(block))
    alike = {name: same for same in experts for name in same}
    together = {name: alike.get(name, (name,)) for name in linears_of(block) if name in quantized}
    return {name: same for name, same in together.items() if same[0] == name}


def _shown(transformations: Iterable[str]) -> list[str]:
    """Those that are shown one by one: of experts' the first stands for all."""
    firsts: dict[str, str] = {}
    for name in transformations:
        firsts.setdefault(name_in_every_expert(name), name)
    return list(firsts.values())


def choose_samples(stream: Sequence[Tensor]) -> list[int]:
    """Indices of up to `MOST_SAMPLES` samples spread over the stream, about `MOST_TOKENS` tokens, at least one."""
    tokens = max(1, stream[0].shape[:-1].numel())
    count = min(len(stream), MOST_SAMPLES, max(1, MOST_TOKENS // tokens))
    return torch.linspace(0, len(stream) - 1, count).round().long().unique().tolist()


def mean_error(pairs: Iterator[tuple[Tensor, Tensor]]) -> Error:
    """Mean over tokens of |ŷ − y|/|y| and of the cosine between them, for (ŷ, y) per sample."""
    relative, cosine, tokens = 0.0, 0.0, 0
    for answer, truth in pairs:
        y_hat, y = answer.flatten(0, -2).float(), truth.to(answer.device).flatten(0, -2).float()
        relative += float(((y_hat - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-12)).sum())
        cosine += float(nn.functional.cosine_similarity(y_hat, y, dim=-1).sum())
        tokens += len(y)
    return Error(relative=relative / tokens, cosine=cosine / tokens)


def outlier_ratio(rows: Tensor) -> float:  # (tokens, channels)
    """The largest channel's maximum over the median channel's."""
    maxima = rows.abs().amax(0)
    return float(maxima.max() / maxima.median().clamp_min(1e-12))


def _part(stream: Sequence[Tensor], chosen: Sequence[int]) -> Stream:
    return {sample: stream[sample].clone() for sample in chosen}


def _same(one: Learnables, other: Learnables) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _thinned(values: Tensor) -> Tensor:
    """At most `MOST_CHANNELS` of `values`, evenly spaced."""
    flat = values.flatten()
    return flat[torch.linspace(0, len(flat) - 1, min(len(flat), MOST_CHANNELS)).round().long()]


def _pooled(rows: Tensor, shape: tuple[int, int]) -> Tensor:
    """Maxima of `rows` (tokens, channels) over a grid of at most `shape` cells."""
    size = (min(rows.shape[0], shape[0]), min(rows.shape[1], shape[1]))
    return nn.functional.adaptive_max_pool2d(rows[None].float(), size)[0]
