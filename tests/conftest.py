"""Settings of the whole suite: offline, one thread, and hypothesis without a clock."""

import os
from typing import Any

# Before anything imports Triton: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import torch
import wrapt
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the tensors here are small; threads would only wait for each other

# Reproducible: the same examples on every run, and no failure because a machine is busy.
settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


@wrapt.when_imported("transformers.modeling_utils")
def _load_into_aligned_memory(modeling_utils: Any) -> None:
    """Weights that are read lie where their file has them, and some processors' BLAS adds up unaligned rows in
    another order. Copied, they are where a model built in memory has them, and results can be compared bit for bit.
    """

    def aligned(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        loaded = wrapped(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta and tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()
        return loaded

    wrapt.wrap_function_wrapper(modeling_utils, "PreTrainedModel.from_pretrained", aligned)
