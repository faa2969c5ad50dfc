"""Settings of the whole suite: offline, one thread, and hypothesis without a clock."""

import os

# Before anything imports Triton: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the tensors here are small; threads would only wait for each other

# Reproducible: the same examples on every run, and no failure because a machine is busy.
settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
