"""`lrquant doctor`: the capabilities of this machine, and what to install for more."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from lrquant.cli import console
from lrquant.cli.quantize import JsonFile
from lrquant.errors import LrquantError

# package → (what it is for, how to get it)
OPTIONAL = {
    "lm-eval": ("zero-shot tasks (--tasks)", "pip install 'lrquant[eval]'"),
    "accelerate": ("device_map, and lm-eval's models", "pip install 'lrquant[eval]'"),
    "tensorboard": ("--log-to tensorboard", "pip install 'lrquant[tensorboard]'"),
    "wandb": ("--log-to wandb", "pip install 'lrquant[wandb]'"),
    "vllm": ("serving lrquant's checkpoints", "pip install vllm"),
}


def doctor(json: JsonFile = None) -> None:
    """Show what this machine can do: PyTorch's build, devices, memory, bf16, packages, and what to install."""
    console.check_output(json)
    required, wrong = _required()
    with console.status("Checking this machine"):
        machine = _machine()
        devices = _devices()
    optional = {name: _version(name) for name in OPTIONAL}
    console.table("This machine", ["", ""], [[name, str(value)] for name, value in machine.items()], words=(0, 1))
    console.table("Devices", ["device", "name", "memory", "bf16"], [list(row.values()) for row in devices], (0, 1))
    rows = [[name, found or "not installed", wanted] for name, (found, wanted) in required.items()]
    console.table("Packages", ["package", "found", "needed"], rows, words=(0, 1, 2))
    rows = [
        [name, found or "not installed", OPTIONAL[name][0], "" if found else OPTIONAL[name][1]]
        for name, found in optional.items()
    ]
    console.table("Optional", ["package", "found", "for", "get it by"], rows, words=(0, 1, 2, 3))
    for line in _advice(devices):
        console.note(line)
    console.write_json(
        json,
        {
            "machine": machine,
            "devices": devices,
            "required": {name: found for name, (found, _) in required.items()},
            "optional": optional,
        },
    )
    if wrong:
        raise LrquantError(
            f"incompatible packages: {'; '.join(wrong)}; pip install -U lrquant installs compatible ones"
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _required() -> tuple[dict[str, tuple[str | None, str]], list[str]]:
    """package → (version found, versions needed), and a line for each that is missing or outside its range."""
    from packaging.requirements import Requirement

    found: dict[str, tuple[str | None, str]] = {}
    wrong = []
    for line in requires("lrquant") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        found[requirement.name] = (installed, str(requirement.specifier))
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed or 'is missing'}, needed {requirement.specifier}")
    return found, wrong


def _machine() -> dict[str, Any]:
    import torch
    from huggingface_hub import constants

    from lrquant import __version__

    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    cache = Path(constants.HF_HOME)
    where = next(parent for parent in (cache, *cache.parents) if parent.exists())
    return {
        "lrquant": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, built for {build}",
        "CPU": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "memory": _memory(),
        "free disk here": console.megabytes(shutil.disk_usage(Path.cwd()).free),
        "HF_HOME": f"{cache}, {console.megabytes(shutil.disk_usage(where).free)} free",
        "hub": "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "online if the network is available",
    }


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{console.megabytes(total)}, {console.megabytes(free)} free"


def _devices() -> list[dict[str, str]]:
    """Every device that PyTorch can use, and whether it has fast bf16."""
    import torch

    found = [{"device": "cpu", "name": platform.processor() or platform.machine(), "memory": "", "bf16": _cpu_bf16()}]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return found
    for index in range(torch.accelerator.device_count()):
        name, memory, bf16 = accelerator.type, "", "yes"
        if accelerator.type == "cuda":
            properties = torch.cuda.get_device_properties(index)
            name, memory = properties.name, console.megabytes(properties.total_memory)
            bf16 = "yes" if torch.cuda.is_bf16_supported(including_emulation=False) else "no: use --dtype float32"
        found.append({"device": f"{accelerator.type}:{index}", "name": name, "memory": memory, "bf16": bf16})
    return found


def _cpu_bf16() -> str:
    import torch

    capable = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return "in hardware" if capable is not None and capable() else "slow: float32 is used"


def _advice(devices: list[dict[str, str]]) -> list[str]:
    if len(devices) > 1:
        return []
    return [
        "no accelerator: models of up to a few hundred million parameters take minutes here, larger ones hours; "
        "weight-only quantization with --method rtn is fast at any size"
    ]
