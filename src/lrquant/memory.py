"""Memory: the peak of a piece of work, and what is left to use."""

import os
import resource
import sys
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


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
