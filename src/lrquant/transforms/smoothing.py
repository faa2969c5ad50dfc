"""The four places where a block's channels can be rescaled without changing its function.

| transformation | scale S per | S divides | S multiplies |
|---|---|---|---|
| norm → linears | hidden channel | the norm's output | the linears' columns |
| v → out | value channel of a key/value head | v's rows | out's columns |
| q · k | query channel (of a pair that RoPE rotates) | q's rows | k's rows |
| up → down | intermediate channel | up's rows | down's columns |

S > 0 and, where biases can hold it, a shift δ are learned (LRQuant §3; OmniQuant §3.3). Query heads that
share a key/value head share its scales; channels that RoPE rotates together share one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.transforms.equivalence import Edits, Parameters, spread
from lrquant.transforms.statistics import ChannelStatistics

LEAST_SCALE = 1e-2


def log_scale(absmax: Tensor) -> Tensor:
    """Logarithmic activation equivalent, S = a / log₂(2 + a) (LRQuant §3.2), at least 1e-2."""
    return (absmax / torch.log2(2 + absmax)).clamp_min(LEAST_SCALE)


def smoothquant_scale(absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's S = a^α / w^(1−α) (§4), at least 1e-2."""
    weight_absmax = weight_absmax.clamp_min(1e-5)
    return (absmax.clamp_min(1e-5) ** alpha / weight_absmax ** (1 - alpha)).clamp_min(LEAST_SCALE)


def initial_scale(absmax: Tensor, weight_absmax: Tensor, init: str, alpha: float) -> Tensor:
    """Initial scales, (channels,), by the recipe's `init`: log, smoothquant or neutral."""
    if init == "neutral":
        return torch.ones_like(absmax)
    return log_scale(absmax) if init == "log" else smoothquant_scale(absmax, weight_absmax, alpha)


@dataclass(frozen=True)
class NormToLinears:
    """A norm whose output feeds `linears` and nothing else. `offset` is 1 where the norm multiplies by 1 + weight.

    `shift` is false where zeros join the norm's output before the linears see it: they would not move along.
    """

    norm: str
    linears: tuple[str, ...]
    offset: float = 0.0
    shift: bool = True

    @property
    def name(self) -> str:
        return f"{self.norm}->linears"

    @property
    def bias_slots(self) -> tuple[str, ...]:
        return (self.norm, *self.linears) if self.shift else ()

    def initial(
        self, params: Parameters, statistics: Mapping[str, ChannelStatistics], init: str, alpha: float
    ) -> dict[str, Tensor]:
        readers = [linear for linear in self.linears if linear in statistics]  # of a router there are none
        maxima = [seen for each in readers if (seen := statistics[each].absmax) is not None]
        midpoint = statistics[readers[0]].midpoint
        assert midpoint is not None
        absmax = torch.stack(maxima).amax(0)  # an expert's own are of its tokens alone
        weight_absmax = torch.stack([params[f"{linear}.weight"].abs().amax(0) for linear in self.linears]).amax(0)
        shifts = f"{self.norm}.bias" in params and init != "neutral"
        shift = midpoint if shifts else torch.zeros_like(midpoint)
        return {"scale": initial_scale(absmax, weight_absmax, init, alpha), "shift": shift}

    def record(self, params: Parameters, scale: Tensor, shift: Tensor | None, edits: Edits) -> None:
        edits.norm[self.norm] = (scale, shift, self.offset)
        for linear in self.linears:
            edits.scale_columns(linear, scale)
            if shift is not None:
                edits.input_shift[linear] = shift


@dataclass(frozen=True)
class ValueToOutput:
    """Values pass to the output projection through attention weights that sum to one.

    `value_rows` (kv_heads, head_dim) are v's rows in `value`; `output_columns` (kv_heads, group, head_dim)
    are the columns of `output` that read them. `shift` is false where the weights do not sum to one (attention
    sinks, gates behind attention). `within` tells several such pairs of a block apart.
    """

    value: str
    output: str
    value_rows: Tensor
    output_columns: Tensor
    shift: bool = True
    within: str = ""

    @property
    def linears(self) -> tuple[str, ...]:
        return self.value, self.output

    @property
    def name(self) -> str:
        return f"{self.within}value->output"

    @property
    def bias_slots(self) -> tuple[str, ...]:
        return (self.value, self.output) if self.shift else ()

    def initial(
        self, params: Parameters, statistics: Mapping[str, ChannelStatistics], init: str, alpha: float
    ) -> dict[str, Tensor]:
        columns = self.output_columns
        absmax = statistics[self.output].absmax
        assert absmax is not None
        weight_absmax = params[f"{self.output}.weight"].abs().amax(0)
        scale = initial_scale(absmax[columns].amax(1), weight_absmax[columns].amax(1), init, alpha)
        return {"scale": scale.flatten(), "shift": torch.zeros_like(scale).flatten()}

    def record(self, params: Parameters, scale: Tensor, shift: Tensor | None, edits: Edits) -> None:
        value, output = params[f"{self.value}.weight"], params[f"{self.output}.weight"]
        per_head = scale.view(self.value_rows.shape)
        edits.scale_rows(self.value, spread(value.shape[0], self.value_rows, 1 / per_head, 1.0, scale))
        columns = self.output_columns
        edits.scale_columns(self.output, spread(output.shape[1], columns, per_head[:, None], 1.0, scale))
        if shift is not None:
            per_head = shift.view(self.value_rows.shape)
            edits.output_shift[self.value] = spread(value.shape[0], self.value_rows, per_head, 0.0, scale)
            edits.input_shift[self.output] = spread(output.shape[1], columns, per_head[:, None], 0.0, scale)


@dataclass(frozen=True)
class QueryKey:
    """Queries divided and keys multiplied by the same S. `pair` (head_dim,) names each channel's scale.

    Rotary embeddings turn two channels into each other, so both have one scale. Where a norm follows the
    projections (`query_norm`, `key_norm`), the scales go into its weight: one set of them where the heads share
    it, and where it is as wide as all heads, rows are its elements. Otherwise each key/value head has its own.
    """

    query: str
    key: str
    query_rows: Tensor  # (kv_heads, group, head_dim)
    key_rows: Tensor  # (kv_heads, head_dim)
    pair: Tensor  # (head_dim,) → 0 … scales − 1
    query_norm: str | None = None
    key_norm: str | None = None
    offset: float = 0.0
    within: str = ""

    @property
    def linears(self) -> tuple[str, ...]:
        return self.query, self.key

    @property
    def name(self) -> str:
        return f"{self.within}query*key"

    @property
    def bias_slots(self) -> tuple[str, ...]:
        return ()

    def initial(
        self, params: Parameters, statistics: Mapping[str, ChannelStatistics], init: str, alpha: float
    ) -> dict[str, Tensor]:
        heads = 1 if self._shared(params) else self.key_rows.shape[0]
        return {"scale": torch.ones(heads * (int(self.pair.max()) + 1), device=params[f"{self.key}.weight"].device)}

    def record(self, params: Parameters, scale: Tensor, shift: Tensor | None, edits: Edits) -> None:
        per_channel = scale.view(-1, int(self.pair.max()) + 1)[:, self.pair.to(scale.device)]  # (heads, head_dim)
        if self.query_norm and self.key_norm:
            if self._shared(params):
                edits.norm[self.query_norm] = (per_channel[0], None, self.offset)
                edits.norm[self.key_norm] = (1 / per_channel[0], None, self.offset)
                return
            for norm, rows, factors in (
                (self.query_norm, self.query_rows, per_channel[:, None]),
                (self.key_norm, self.key_rows, 1 / per_channel),
            ):
                weight = params[f"{norm}.weight"]
                edits.norm[norm] = (
                    spread(weight.numel(), rows, factors, 1.0, scale).view(weight.shape),
                    None,
                    self.offset,
                )
            return
        rows_of_query, rows_of_key = (params[f"{name}.weight"].shape[0] for name in (self.query, self.key))
        edits.scale_rows(self.query, spread(rows_of_query, self.query_rows, 1 / per_channel[:, None], 1.0, scale))
        edits.scale_rows(self.key, spread(rows_of_key, self.key_rows, per_channel, 1.0, scale))

    def _shared(self, params: Parameters) -> bool:
        """Whether all heads go through one norm of a head's width."""
        return self.query_norm is not None and params[f"{self.query_norm}.weight"].numel() == len(self.pair)


@dataclass(frozen=True)
class UpToDown:
    """A projection that reaches `down` through a function f with f(x/S)·S = f(x): a gate's product, or ReLU.

    `up_rows` (width,) are the rows of `up` that the columns of `down` read in order; None: all of them.
    """

    up: str
    down: str
    up_rows: Tensor | None = None
    within: str = ""

    @property
    def linears(self) -> tuple[str, ...]:
        return self.up, self.down

    @property
    def name(self) -> str:
        return f"{self.within}up->down"

    @property
    def bias_slots(self) -> tuple[str, ...]:
        return ()

    def initial(
        self, params: Parameters, statistics: Mapping[str, ChannelStatistics], init: str, alpha: float
    ) -> dict[str, Tensor]:
        absmax = statistics[self.down].absmax
        assert absmax is not None
        return {"scale": initial_scale(absmax, params[f"{self.down}.weight"].abs().amax(0), init, alpha)}

    def record(self, params: Parameters, scale: Tensor, shift: Tensor | None, edits: Edits) -> None:
        rows = 1 / scale
        if self.up_rows is not None:
            rows = spread(params[f"{self.up}.weight"].shape[0], self.up_rows, rows, 1.0, scale)
        edits.scale_rows(self.up, rows)
        edits.scale_columns(self.down, scale)
