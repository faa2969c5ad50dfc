"""Load a checkpoint with everything that its recipe specifies."""

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.utils import get_direct_state_dict, replace_direct_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from lrquant.architectures import family_of
from lrquant.architectures.targets import is_linear, linears_of
from lrquant.formats.activation_quant import CACHE_SCALES, attention_modules, install, route_attention, set_static_scale
from lrquant.loading.pretrained import load_model, resolve_model
from lrquant.recipe import RECIPE_FILE, Recipe
from lrquant.runtime.distributed import apart
from lrquant.runtime.files import check_sums


def saved_recipe(path: str) -> Recipe | None:
    """The recipe beside a local checkpoint, if it has one."""
    file = Path(resolve_model(path)) / RECIPE_FILE
    return Recipe.from_yaml(file) if file.is_file() else None


def apply_attention_quantization(model: Any, recipe: Recipe, scales: Mapping[str, Tensor]) -> bool:
    """Quantize what attention is given as `recipe` says; `scales` are calibrated ones by name. Whether any was done."""
    scheme = recipe.scheme.attention_inputs
    if scheme is None or not route_attention(model):
        return False
    for stage in family_of(model).stages(model, recipe.towers):
        inputs: dict[nn.Module, Any] = {}
        for index, block in enumerate(stage.blocks(model)):
            own = recipe.scheme.within(f"{stage.path}.{index}")
            inputs |= {module: own.of(name).inputs for name, module in linears_of(block).items()}
        install({}, attention_modules(model.get_submodule(stage.path).modules(), inputs, scheme), scheme)
    for name, scale in scales.items():
        set_static_scale(model, name, scale)
    return True


def _cache_scales(folder: Path) -> dict[str, Tensor]:
    """Scales of keys and values in a checkpoint's files, by name."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name.endswith(CACHE_SCALES)}  # noqa: SIM118
    return found


def _in_one_dtype(model: Any) -> None:
    """Weights of four-bit floats come out as bfloat16, whatever the model computes in; a linear wants one dtype."""
    for module in filter(is_linear, model.modules()):
        if module.weight.dtype != model.dtype:
            weight = module.weight.detach().to(model.dtype)
            replace_direct_state_dict(module, get_direct_state_dict(module) | {"weight": weight})


def load(path: str, dtype: torch.dtype | str = torch.float32, trust_remote_code: bool = False) -> Any:
    """Load a model from disk, the zoo or the hub; attention is quantized too in checkpoints written by lrquant.

    Plain `AutoModelForCausalLM.from_pretrained` loads the same weights, with quantized inputs of linears. The
    checkpoint format cannot describe quantized queries, keys and values, which this function adds. It can describe a
    quantized key-value cache, which vLLM reads and this function too, but transformers 5.24 with compressed-tensors
    0.20 ignores it.

    Raises:
        LrquantError: a weight file is damaged; checkpoints written by lrquant have checksums.
    """
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    check_sums(Path(resolve_model(path)))
    model = load_model(path, dtype, trust_remote_code)  # type: ignore[arg-type]
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None and hasattr(model, "ct_decompress_hook"):
        with apart(), redirect_stderr(io.StringIO()):  # its progress bars cannot be turned off
            compressor.decompress_model(model)
        _in_one_dtype(model)
    recipe = saved_recipe(path)
    if recipe is not None:
        apply_attention_quantization(model, recipe, _cache_scales(Path(resolve_model(path))))
    return model
