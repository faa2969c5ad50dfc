"""The machine a run uses: its device, the processes that share the work, and what its processor is fast at."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from lrquant.runtime.distributed import ALONE, Ranks


@dataclass(frozen=True)
class Machine:
    """Where a run computes, in which precision, and with whom it shares the work."""

    device: torch.device
    dtype: torch.dtype = torch.float32  # of the model while it runs
    ranks: Ranks = ALONE


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices several times faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return capabilities.get("amx_bf16", False)
    return False


def has_triton() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def matrix_products(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Within, matrix products run in `precision` (`float32` or `bfloat16`), with sums in float32."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
