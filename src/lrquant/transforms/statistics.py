"""Statistics of a linear's input for smoothing: per-channel maxima and midpoints."""

from dataclasses import dataclass

import torch
from torch import Tensor

MIDPOINT_MOMENTUM = 0.99


@dataclass
class ChannelStatistics:
    """Running statistics of one linear's input X over calibration samples, each (in_features,), float32."""

    absmax: Tensor | None = None  # max over tokens of |X_j|
    midpoint: Tensor | None = None  # (max + min)/2 of a sample, exponentially averaged over samples

    def to(self, device: torch.device) -> "ChannelStatistics":
        absmax, midpoint = self.absmax, self.midpoint
        return ChannelStatistics(
            None if absmax is None else absmax.to(device), None if midpoint is None else midpoint.to(device)
        )

    def update(self, x: Tensor) -> None:  # (samples, tokens, in_features)
        self.add(*extremes_of(x))

    def add(self, low: Tensor, high: Tensor) -> None:  # (samples, in_features) each
        """The next samples, by their extremes over tokens."""
        absmax = torch.maximum(-low, high).amax(0)
        self.absmax = absmax if self.absmax is None else torch.maximum(self.absmax, absmax)
        for middle in (low + high) / 2:
            if self.midpoint is None:
                self.midpoint = middle
            else:
                self.midpoint = MIDPOINT_MOMENTUM * self.midpoint + (1 - MIDPOINT_MOMENTUM) * middle


def extremes_of(x: Tensor) -> tuple[Tensor, Tensor]:  # (samples, tokens, in_features)
    """(min, max) over tokens, (samples, in_features), float32."""
    return x.detach().amin(1).float(), x.detach().amax(1).float()
