"""Layouts of heads in the rows of projections: index tensors for the declarations of families.

Queries are (kv_heads, group, head_dim): the `group` query heads of one key/value head are adjacent.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Heads(NamedTuple):
    """Rows of the projections, and the output projection's columns, by head."""

    query: Tensor  # (kv_heads, group, head_dim)
    key: Tensor  # (kv_heads, head_dim)
    value: Tensor  # (kv_heads, head_dim)
    output: Tensor  # (kv_heads, group, head_dim)


def separate(kv_heads: int, group: int, head_dim: int) -> Heads:
    """Three projections, heads one after the other."""
    query = torch.arange(kv_heads * group * head_dim).view(kv_heads, group, head_dim)
    key = torch.arange(kv_heads * head_dim).view(kv_heads, head_dim)
    return Heads(query, key, key, query)


def grouped(kv_heads: int, group: int, head_dim: int) -> Heads:
    """One projection; each key/value head's queries, then its key, then its value (NeoX, Falcon)."""
    rows = torch.arange(kv_heads * (group + 2) * head_dim).view(kv_heads, group + 2, head_dim)
    output = torch.arange(kv_heads * group * head_dim).view(kv_heads, group, head_dim)
    return Heads(rows[:, :group], rows[:, group], rows[:, group + 1], output)


def stacked(kv_heads: int, group: int, head_dim: int) -> Heads:
    """One projection; all queries, then all keys, then all values (Phi-3)."""
    query, key, _, output = separate(kv_heads, group, head_dim)
    key = key + query.numel()
    return Heads(query, key, key + key.numel(), output)


def rope_pairs(head_dim: int, rotary_dim: int | None = None) -> Tensor:
    """Scale of each channel when RoPE turns channel j with j + rotary_dim/2; channels past rotary_dim stand alone."""
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    half = torch.arange(rotary_dim // 2)
    return torch.cat([half, half, torch.arange(rotary_dim // 2, head_dim - rotary_dim // 2)])


def unpaired(head_dim: int) -> Tensor:
    """Every channel has its own scale: positions enter before the block."""
    return torch.arange(head_dim)
