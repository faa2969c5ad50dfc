"""Export dense checkpoints: the rounded weights in floating point.

Any program that loads the original loads them. They save no space, and activations are not quantized.
"""

import json
import shutil
from pathlib import Path

import torch

from lrquant.errors import UsageError
from lrquant.export.exporter import Exported
from lrquant.export.saving import as_stored_before, whole_directory
from lrquant.export.shards import ShardWriter
from lrquant.loading.auto_class import auto_model
from lrquant.loading.checkpoint import load
from lrquant.loading.pretrained import load_config
from lrquant.runtime.files import write_sums

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")  # the tokenizer, the chat template, how pictures are prepared


def export_dense(folder: Path, target: Path, dtype: str = "bf16") -> Exported:
    """Write the checkpoint in `folder` to the folder `target`, its weights in `dtype` (bf16, f16 or f32).

    Raises:
        UsageError: the model computes something that weights do not hold (run-time transforms).
        LrquantError: a file is damaged, or `target` cannot be written. Nothing is left behind.
    """
    values = _plain_configuration(folder) | {"dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    model = load(str(folder), DTYPES[dtype])
    config = load_config(str(folder))
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        expected = auto_model(config).from_config(config).state_dict()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found = {name: tensor for name, tensor in model.state_dict().items() if name in expected and name not in tied}
    with whole_directory(target) as part:
        for path in (path for pattern in _OTHER_FILES for path in folder.glob(pattern)):
            if not path.name.endswith(".index.json"):
                shutil.copy(path, part)
        shards = ShardWriter(part)
        for name, tensor in as_stored_before(model, found, {}).items():
            shards.add({name: tensor.clone()})
        size = shards.finish()
        write_sums(part)
        (part / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    return Exported(target, size, {"weights": f"dense, {dtype}"})


def _plain_configuration(folder: Path) -> dict[str, object]:
    """The configuration without its quantization.

    Raises:
        UsageError: it needs lrquant to run.
    """
    if not (folder / "config.json").is_file():
        what = "this folder has no config.json, so it is not a model" if folder.is_dir() else "no such folder"
        raise UsageError(f"{folder}: {what}")
    values = dict(load_config(str(folder)).to_dict())
    quantization = values.pop("quantization_config", None) or {}
    if quantization.get("quant_method") == "lrquant":
        raise UsageError(
            f"{folder}: needs lrquant to run (added biases, or inputs transformed at run time), which a dense "
            "checkpoint cannot store; quantize with --shift off and without --rotate down"
        )
    return values
