"""Where scales and shifts start, and the statistics they start from."""

import pytest
import torch
from torch import Tensor

from lrquant.architectures.layouts import grouped, rope_pairs, separate, stacked
from lrquant.transforms import NormToLinears, QueryKey, UpToDown, ValueToOutput
from lrquant.transforms.smoothing import LEAST_SCALE, log_scale, smoothquant_scale
from lrquant.transforms.statistics import ChannelStatistics


def test_logarithmic_equivalent_by_hand() -> None:
    # a/log₂(2 + a): 2/log₂4 = 1, 6/log₂8 = 2, 14/log₂16 = 3.5; a dead channel gets the least scale.
    assert log_scale(torch.tensor([2.0, 6.0, 14.0, 0.0])).tolist() == pytest.approx([1.0, 2.0, 3.5, LEAST_SCALE])


def test_smoothquant_by_hand() -> None:
    # a^α/w^(1−α): √9/√4 = 1.5; α = 1 takes the activations' maximum, α = 0 the weights' inverse.
    a, w = torch.tensor([9.0]), torch.tensor([4.0])
    assert smoothquant_scale(a, w, 0.5).item() == pytest.approx(1.5)
    assert smoothquant_scale(a, w, 1.0).item() == pytest.approx(9.0)
    assert smoothquant_scale(a, w, 0.0).item() == pytest.approx(0.25)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_channels_have_finite_scales(alpha: float) -> None:
    for a, w in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0)):
        scale = smoothquant_scale(torch.tensor([a]), torch.tensor([w]), alpha)
        assert torch.isfinite(scale).all()
        assert (scale >= LEAST_SCALE).all()


def test_statistics_by_hand() -> None:
    statistics = ChannelStatistics()
    statistics.update(torch.tensor([[[1.0, -4.0], [3.0, 2.0]], [[-5.0, 0.0], [1.0, 2.0]]]))
    # Maxima over both samples: max(3, 5) and max(4, 2). Midpoints (2, −1), then 0.99·(2, −1) + 0.01·(−2, 1).
    assert statistics.absmax is not None
    assert statistics.midpoint is not None
    assert statistics.absmax.tolist() == [5.0, 4.0]
    assert statistics.midpoint.tolist() == pytest.approx([1.96, -0.98])


def test_statistics_do_not_depend_on_how_samples_are_batched() -> None:
    x = torch.randn(6, 5, 8)
    together, apart = ChannelStatistics(), ChannelStatistics()
    together.update(x)
    for sample in x:
        apart.update(sample[None])
    torch.testing.assert_close(together.absmax, apart.absmax, rtol=0, atol=0)
    torch.testing.assert_close(together.midpoint, apart.midpoint, rtol=0, atol=0)


def statistics_of(**absmax: list[float]) -> dict[str, ChannelStatistics]:
    return {name: ChannelStatistics(torch.tensor(a), torch.full((len(a),), 0.5)) for name, a in absmax.items()}


@pytest.mark.parametrize(("biased", "shift"), [(True, 0.5), (False, 0.0)])
def test_shifts_start_at_the_midpoint_only_under_a_norm_with_bias(biased: bool, shift: float) -> None:
    params = {"norm.weight": torch.ones(2), "a.weight": torch.tensor([[1.0, -4.0]])}
    if biased:
        params["norm.bias"] = torch.zeros(2)
    start = NormToLinears("norm", ("a",)).initial(params, statistics_of(a=[6.0, 9.0]), "log", 0.5)
    assert start["scale"].tolist() == pytest.approx([2.0, 9 / torch.tensor(11.0).log2().item()])
    assert start["shift"].tolist() == [shift, shift]


def test_smoothquant_looks_at_the_largest_weight_of_all_linears() -> None:
    params: dict[str, Tensor] = {"norm.weight": torch.ones(1), "a.weight": torch.ones(1, 1)}
    params["b.weight"] = torch.tensor([[-4.0]])
    start = NormToLinears("norm", ("a", "b")).initial(params, statistics_of(a=[9.0]), "smoothquant", 0.5)
    assert start["scale"].tolist() == pytest.approx([1.5])  # √9/√4


def test_query_heads_that_share_a_value_head_share_the_largest_scale() -> None:
    heads = separate(kv_heads=1, group=2, head_dim=2)
    params = {"v.weight": torch.ones(2, 4), "o.weight": torch.ones(4, 4)}
    # Columns 0 and 2 of o read value channel 0, columns 1 and 3 value channel 1.
    seen = statistics_of(o=[2.0, 14.0, 6.0, 2.0])
    start = ValueToOutput("v", "o", heads.value, heads.output).initial(params, seen, "log", 0.5)
    assert start["scale"].tolist() == pytest.approx([2.0, 3.5])


def test_query_key_scales_start_at_one_for_each_rotary_pair_of_each_key_head() -> None:
    heads = separate(kv_heads=2, group=2, head_dim=4)
    params = {"k.weight": torch.ones(8, 4), "q_norm.weight": torch.ones(4), "wide_norm.weight": torch.ones(16)}
    start = QueryKey("q", "k", heads.query, heads.key, rope_pairs(4)).initial(params, {}, "log", 0.5)
    assert start["scale"].tolist() == [1.0] * 4  # 2 heads × 2 pairs
    normed = QueryKey("q", "k", heads.query, heads.key, rope_pairs(4), "q_norm", "k_norm")
    assert normed.initial(params, {}, "log", 0.5)["scale"].tolist() == [1.0] * 2  # the norm is shared by the heads
    wide = QueryKey("q", "k", heads.query, heads.key, rope_pairs(4), "wide_norm", "wide_norm")
    assert wide.initial(params, {}, "log", 0.5)["scale"].tolist() == [1.0] * 4  # the norm has elements for each head


def test_down_projections_start_from_their_own_input() -> None:
    params = {"up.weight": torch.ones(2, 3), "down.weight": torch.ones(3, 2)}
    start = UpToDown("up", "down").initial(params, statistics_of(down=[2.0, 6.0]), "log", 0.5)
    assert start["scale"].tolist() == pytest.approx([1.0, 2.0])


# --- Layouts ---


def test_rotary_pairs_by_hand() -> None:
    assert rope_pairs(4).tolist() == [0, 1, 0, 1]
    # Six of eight channels rotate, j with j + 3; the last two stand alone.
    assert rope_pairs(8, 6).tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def test_heads_in_one_projection_by_hand() -> None:
    # Per key/value head: two queries, a key, a value, each one channel wide.
    heads = grouped(kv_heads=2, group=2, head_dim=1)
    assert heads.query.flatten().tolist() == [0, 1, 4, 5]
    assert heads.key.flatten().tolist() == [2, 6]
    assert heads.value.flatten().tolist() == [3, 7]
    assert heads.output.flatten().tolist() == [0, 1, 2, 3]
    # All queries, then all keys, then all values.
    heads = stacked(kv_heads=2, group=2, head_dim=1)
    assert heads.query.flatten().tolist() == [0, 1, 2, 3]
    assert heads.key.flatten().tolist() == [4, 5]
    assert heads.value.flatten().tolist() == [6, 7]
