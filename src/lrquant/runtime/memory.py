"""Memory: measuring peaks, finding what is available, and releasing what is free."""

import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_C = ctypes.CDLL(None)
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of <malloc.h>


class PeakMemory:
    """The peak since creation on an accelerator; on the CPU it cannot be reset and is that of the process."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_device_bytes(device: torch.device) -> int:
    """Bytes that an accelerator has left."""
    return int(torch.accelerator.get_memory_info(device)[0])


def available_bytes() -> int:
    """Host memory that this process may still take: what the machine has free, its container and its limits allow."""
    bounds = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    status = Path("/proc/meminfo")
    if status.is_file():  # what is cached can be had too
        lines = dict(line.split(":") for line in status.read_text().splitlines())
        bounds = [int(lines["MemAvailable"].split()[0]) * 1024]
    try:
        bounds.append(int((_CGROUP / "memory.max").read_text()) - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # not in a container with a limit
        pass
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            bounds.append(soft - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return max(0, min(bounds))


def keep_large_apart() -> None:
    """Have the C library allocate every tensor of 1 MiB or more separately, and return it to the system when freed.

    By default, it keeps freed tensors of up to 32 MiB for later ones, which rarely fit exactly: a step of a large block
    then needs up to a quarter more memory, depending on chance. This setting makes steps of large blocks about four
    percent slower, and those of small ones a quarter.
    """
    choose = getattr(_C, "mallopt", None)  # glibc's; other allocators do so anyway
    if choose is not None:
        choose(_MMAP_THRESHOLD, 1 << 20)


def give_back_freed() -> None:
    """Return freed memory of smaller tensors to the system.

    Tensors that stay alive, such as learned parameters, lie between them. Without this, memory would become more
    fragmented with every block, and each block would need more than the one before.
    """
    trim = getattr(_C, "malloc_trim", None)
    if trim is not None:
        trim(0)
