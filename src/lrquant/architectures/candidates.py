"""Candidate transformations of a traced block, suggested by its data flow and not yet verified.

Channels are identified by their values: random float64 numbers are equal only if one is a copy of the other. So the
layout of heads, groups and fused projections can be found whatever the model calls them. If a value was multiplied by
something, its gradient gives the factor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.architectures.trace import Attention, Passed, Trace
from lrquant.transforms import Equivalence, NormToLinears, QueryKey, UpToDown, ValueToOutput

ROUNDING = 1e-9
TRIED = 2  # experts of a mixture on which a transformation is tried that each expert has
NOT_THERE = -1


def candidates(seen: Trace) -> Iterator[list[Equivalence]]:
    """Candidates in groups; of each group at most one can be used, and the better ones stand first."""
    for norm, linears in _norm_readers(seen).items():
        yield list(_norm_to_linears(seen, norm, linears))
    for attention in seen.attention:
        value = _source(seen, attention.value)
        if value is not None and not value.is_norm and bool((value.rows >= 0).all()):
            yield list(_value_to_output(seen, attention, value))
        yield list(_query_key(seen, attention))
    yield from _up_to_down(seen)


# --- Norms ---


def _norm_readers(seen: Trace) -> dict[str, tuple[str, ...]]:
    """norm → linears that receive its output, whole tokens of it, maybe times a constant."""
    readers: dict[str, tuple[str, ...]] = {}
    received = {name: linear.given for name, linear in seen.linears.items()} | seen.routers
    for norm, passed in seen.norms.items():
        rows = passed.answered.detach().flatten(0, -2)
        names = [
            name
            for name, given in received.items()
            if rows.shape[-1] == passed.channels == given.shape[-1] and _holds_row(rows, given.detach().flatten(0, -2))
        ]
        if names:
            readers[norm] = tuple(names)
    return readers


def _holds_row(rows: Tensor, given: Tensor) -> bool:
    """Whether the largest row of `given`, (any, width), is a multiple of one of `rows`, (any, width)."""
    if not given.any():
        return False
    row = given[given.abs().amax(-1).argmax()]
    factor = row[:1] / rows[:, :1]  # (rows, 1)
    return bool(((rows * factor - row).abs().amax(-1) <= ROUNDING * row.abs().max()).any())


def _norm_to_linears(seen: Trace, norm: str, readers: Sequence[str]) -> Iterator[Equivalence]:
    """A mixture's experts and router are scaled and not shifted: most have no biases to hold it."""
    routed = seen.routers.keys() | {name for same in seen.alike for name in same}
    shifts = (False,) if routed.intersection(readers) else (True, False)
    without = tuple(name for name in readers if name not in seen.routers)
    for linears in dict.fromkeys((tuple(readers), without)):
        for shift in shifts if linears else ():
            for offset in (0.0, 1.0):
                yield NormToLinears(norm, linears, offset, shift)


# --- Attention ---


@dataclass(frozen=True)
class _Source:
    """The module whose output channels are those of an attention's queries, keys or values, up to one factor."""

    name: str
    is_norm: bool
    passed: Passed
    rows: Tensor  # (heads, head_dim): channel of the module's output; NOT_THERE: it comes from elsewhere


def _source(seen: Trace, tensor: Tensor) -> _Source | None:  # (heads, tokens, head_dim)
    """Where every head's channels come from. The first token is asked, which no rotary embedding turns."""
    modules = [*seen.norms.items(), *seen.linears.items()]
    gradients = _gradients(tensor[0, 0, 0], [passed for _, passed in modules])
    for (name, passed), gradient in zip(modules, gradients, strict=True):
        if gradient is None or int((gradient != 0).sum()) != 1:
            continue
        rows = _located(tensor[:, 0].detach() / gradient[gradient != 0], passed.answered.detach())
        if int(rows[0, 0]) != NOT_THERE:
            rows = torch.where(rows == NOT_THERE, rows, rows % passed.channels)
            return _Source(name, name in seen.norms, passed, rows)
    return None


def _gradients(of: Tensor, to: list[Passed]) -> tuple[Tensor | None, ...]:
    if not of.requires_grad:
        return (None,) * len(to)
    return torch.autograd.grad(of, [passed.answered for passed in to], retain_graph=True, allow_unused=True)


def _located(values: Tensor, among: Tensor) -> Tensor:
    """Index in the flat `among` of each of `values`, (any), or NOT_THERE."""
    flat, order = among.flatten().sort()
    place = torch.searchsorted(flat, values.contiguous()).clamp(1, len(flat) - 1)
    nearest = torch.where((values - flat[place - 1]).abs() <= (flat[place] - values).abs(), place - 1, place)
    found = (flat[nearest] - values).abs() <= ROUNDING * values.abs()
    return torch.where(found, order[nearest], NOT_THERE)


def _heads_alike(rows: Tensor) -> list[list[int]]:  # (heads, head_dim)
    """Heads with the same rows, together: the query heads of one key/value head."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for head, own in enumerate(rows.tolist()):
        groups.setdefault(tuple(own), []).append(head)
    return list(groups.values())


def _value_to_output(seen: Trace, attention: Attention, value: _Source) -> Iterator[Equivalence]:
    heads, width = attention.output.shape[0], attention.value.shape[-1]
    rows = value.rows.repeat_interleave(max(1, heads // len(value.rows)), 0)
    groups = _heads_alike(rows)
    if len({len(group) for group in groups}) != 1:
        return
    value_rows = torch.stack([rows[group[0]] for group in groups])
    for name, linear in seen.linears.items():
        columns = _located(attention.output[:, -1].detach(), linear.given.detach())  # the first token's may be values
        if name == value.name:
            continue
        if bool((columns != NOT_THERE).all()):
            columns = torch.stack([(columns % linear.given.shape[-1])[group] for group in groups])
        elif linear.given.shape[-1] % value_rows.numel() == 0:  # gated on the way; heads mostly stand in their order
            columns = torch.arange(linear.given.shape[-1]).view(len(groups), -1, width)
        else:
            continue
        for shift in (True, False):
            yield ValueToOutput(value.name, name, value_rows, columns, shift)


def _query_key(seen: Trace, attention: Attention) -> Iterator[Equivalence]:
    query, key = _source(seen, attention.query), _source(seen, attention.key)
    if query is None or key is None or query.is_norm != key.is_norm:
        return
    groups = _heads_alike(key.rows.repeat_interleave(max(1, len(query.rows) // len(key.rows)), 0))
    if len({len(group) for group in groups}) != 1:
        return
    key_rows = torch.stack([key.rows[group[0] * len(key.rows) // len(query.rows)] for group in groups])
    query_rows = torch.stack([query.rows[group] for group in groups])
    together = _turned_together(attention.query, query) | _turned_together(attention.key, key)
    pair, channels = _pairs(together, (key_rows != NOT_THERE).all(0) & (query_rows != NOT_THERE).all(0).all(0))
    if not channels:
        return
    query_rows, key_rows = query_rows[..., channels], key_rows[..., channels]
    if not query.is_norm:
        yield QueryKey(query.name, key.name, query_rows, key_rows, pair)
        return
    projections = _projection(seen, query), _projection(seen, key)
    for offset in (0.0, 1.0):
        yield QueryKey(*projections, query_rows, key_rows, pair, query.name, key.name, offset)


def _projection(seen: Trace, norm: _Source) -> str:
    """The linear whose output the norm of queries or keys receives."""
    value = norm.passed.given.detach().flatten()[:1]
    sources = [n for n, p in seen.linears.items() if int(_located(value, p.answered.detach())[0]) != NOT_THERE]
    return sources[-1] if sources else norm.name


def _turned_together(tensor: Tensor, source: _Source) -> set[tuple[int, int]]:
    """Pairs of channels of the first head that the rotary embedding turns into each other at the last token."""
    channel_of = {row: channel for channel, row in enumerate(source.rows[0].tolist())}
    found = set()
    for channel in range(tensor.shape[-1]):
        (gradient,) = _gradients(tensor[0, -1, channel], [source.passed])
        if gradient is not None:
            rows = gradient.flatten().nonzero().flatten() % source.passed.channels
            found |= {(channel, channel_of.get(row, NOT_THERE)) for row in rows.tolist()}
    return found


def _pairs(together: set[tuple[int, int]], usable: Tensor) -> tuple[Tensor, list[int]]:
    """(number of each channel's scale, the channels that can have one): one scale for all that turn together."""
    scale = list(range(len(usable)))
    barred = {channel for channel, fine in enumerate(usable.tolist()) if not fine}
    for _ in scale:  # until nothing changes; pairs mostly need one round
        before = list(scale), len(barred)
        for one, other in together:
            if other == NOT_THERE or one in barred or other in barred:
                barred |= {one, other} - {NOT_THERE}
            else:
                scale[one] = scale[other] = min(scale[one], scale[other])
        if before == (scale, len(barred)):
            break
    channels = [channel for channel in range(len(usable)) if channel not in barred]
    numbers = {first: number for number, first in enumerate(dict.fromkeys(scale[channel] for channel in channels))}
    return torch.tensor([numbers[scale[channel]] for channel in channels], dtype=torch.long), channels


# --- MLPs, and whatever else multiplies one linear's output into another's input ---


def _up_to_down(seen: Trace) -> Iterator[list[Equivalence]]:
    """For every linear, those linears whose rows its columns are multiples of, in an even order."""
    names, modules = list(seen.linears), list(seen.linears.values())
    untried = _untried(seen)
    for down, linear in seen.linears.items():
        width = linear.given.shape[-1]
        if width < 2 or down in untried:
            continue
        starts, nexts = (_rows_behind(linear.given, column, modules) for column in (0, 1))
        found: list[Equivalence] = []
        for up, passed, start, following in zip(names, modules, starts, nexts, strict=True):
            if up == down or start is None or following is None or following <= start:
                continue
            rows = start + (following - start) * torch.arange(width)
            if int(rows[-1]) < passed.channels:
                found.append(UpToDown(up, down, None if width == passed.channels else rows))
        yield found


def _untried(seen: Trace) -> set[str]:
    """Linears of experts beyond the first that tokens reached: what holds of those is used for all."""
    untried: set[str] = set()
    for same in seen.alike:
        reached = [name for name in same if name in seen.linears and bool(seen.linears[name].given.detach().any())]
        untried |= set(same).difference(reached[:TRIED])
    return untried


def _rows_behind(given: Tensor, column: int, ups: list[Passed]) -> list[int | None]:
    """Of each of `ups` the row in which a column of `given` is linear: Σ gradient · output gives the value itself."""
    values = given.flatten(0, -2)[:, column]
    value = values[values.abs().argmax()]
    rows: list[int | None] = []
    for up, gradient in zip(ups, _gradients(value, ups), strict=True):
        products = torch.zeros(1) if gradient is None else (gradient * up.answered).detach().flatten(0, -2).sum(0)
        found = ((products - value.detach()).abs() <= ROUNDING * value.detach().abs()).nonzero().flatten()
        rows.append(int(found[0]) if len(found) == 1 else None)
    return rows
