"""Statistics of the inputs of every linear of a model's blocks, in full precision."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lrquant.architectures import AnyFamily
from lrquant.calibration.capture import capture
from lrquant.loading.block_source import BlockSource, held
from lrquant.reconstruction.block_forward import BlockForward
from lrquant.reconstruction.block_preparation import check_values
from lrquant.transforms.statistics import ChannelStatistics


def gather_statistics(
    model: nn.Module, family: AnyFamily, samples: Sequence[dict[str, Any]], *, device: torch.device
) -> list[dict[str, ChannelStatistics]]:
    """Statistics of the inputs of every block's linears. `samples` are keyword arguments of calls."""
    result = []
    for stage in family.stages(model):
        blocks = stage.blocks(model)
        inputs = capture(model, blocks, samples)
        for index, block in enumerate(blocks):
            check_values(block, f"{stage.path}.{index}")
            with held(BlockSource(model), f"{stage.path}.{index}", device):
                statistics, _ = BlockForward(block, index, inputs, device, 1).advance_full_precision(inputs.hidden)
            result.append({name: value.to(torch.device("cpu")) for name, value in statistics.items()})
    return result
