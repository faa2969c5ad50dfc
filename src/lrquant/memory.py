"""Peak memory of a piece of work: the accelerator's when there is one, else the process's."""

import resource
import sys

import torch


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
