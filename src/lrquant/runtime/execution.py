"""The machine of a run: its device, the processes that share the work, and the capabilities of its processor."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from lrquant.runtime.distributed import ALONE, Ranks


@dataclass(frozen=True)
class Machine:
    """The device and precision of a run, and the ranks that share its work."""

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
    """A context in which matrix products run in `precision` (`float32` or `bfloat16`) and accumulate in float32."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
