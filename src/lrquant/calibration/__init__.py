"""Calibration samples, and the inputs that a model's blocks receive from them."""

from lrquant.calibration.capture import BlockInputs, capture
from lrquant.calibration.text import calibration_samples, evaluation_ids, read_text

__all__ = ["BlockInputs", "calibration_samples", "capture", "evaluation_ids", "read_text"]
