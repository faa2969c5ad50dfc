"""Memory: the peak of a piece of work, what is left to use, and giving back what is free."""

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
    """Counts from its creation on an accelerator; a process's own peak cannot be reset, so it is the run's."""

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
    """Have the C library take every tensor of 1 MiB and more from the system by itself, and give it back when freed.

    Left alone it keeps those of up to 32 MiB for later ones, which rarely fit exactly: a step of a large block takes a
    quarter more memory, and how much depends on chance. Steps of large blocks take some four percent longer this way,
    those of small ones a quarter.
    """
    choose = getattr(_C, "mallopt", None)  # glibc's; other allocators do so anyway
    if choose is not None:
        choose(_MMAP_THRESHOLD, 1 << 20)


def give_back_freed() -> None:
    """Return to the system what was freed of smaller tensors.

    Between them lie those that live on, such as learned parameters: without this every block would find less memory in
    one piece, and take more than the one before.
    """
    trim = getattr(_C, "malloc_trim", None)
    if trim is not None:
        trim(0)
