"""Out-of-memory errors that name the options that help, most effective first."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lrquant.errors import LrquantError


def knobs(batch_size: int, seqlen: int | None, activations: str, *, dtype: torch.dtype) -> list[str]:
    """Options that would need less memory than these settings, most effective first."""
    found = []
    if batch_size > 1:
        found.append(f"--batch-size {batch_size // 2}")
    if activations in ("auto", "device"):
        found.append("--activations host")
    elif activations == "host":
        found.append("--activations disk")
    if seqlen and seqlen > 2:
        found.append(f"--seqlen {seqlen // 2}")
    if dtype == torch.float32:
        found.append("--dtype bfloat16")
    return found


@contextmanager
def advised(options: Callable[[], list[str]]) -> Iterator[None]:
    """A context in which running out of memory becomes a one-line error that names `options()`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _advice(error, options()) from error
    except RuntimeError as error:  # the allocator of host memory has no exception of its own
        if "DefaultCPUAllocator" not in str(error) and "Cannot allocate memory" not in str(error):
            raise
        raise _advice(error, options()) from error


def _advice(error: BaseException, options: list[str]) -> LrquantError:
    where = "the device" if isinstance(error, torch.OutOfMemoryError) else "this machine"
    remedy = f"try, most effective first: {', '.join(options)}" if options else "use a larger device"
    return LrquantError(f"out of memory on {where}; {remedy}")
