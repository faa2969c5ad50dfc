"""lrquant: post-training quantization of transformers with learnable, function-preserving transformations.

    import lrquant
    lrquant.quantize("zoo:llama", lrquant.Recipe.preset("lrquant", wbits=4, abits=4, calibration="zoo:pydoc",
                     nsamples=32, seqlen=256), save_dir="llama-w4a4")
    model = lrquant.load("llama-w4a4")
    lrquant.evaluate(model, ["zoo:pydoc"], tokenizer=...)

Names are imported on first use, so that `import lrquant` is fast. The import also registers lrquant with transformers,
so that transformers can load checkpoints that need lrquant (see _registration).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from lrquant._registration import register_configuration, register_quantizer

if TYPE_CHECKING:
    from lrquant.entrypoints.adapt import adapt
    from lrquant.entrypoints.evaluate import compare_predictions, evaluate, evaluate_answers, evaluate_images
    from lrquant.entrypoints.quantize import quantize
    from lrquant.entrypoints.results import Adapted, Quantized
    from lrquant.errors import LrquantError, UsageError
    from lrquant.loading.checkpoint import load
    from lrquant.recipe import Recipe
    from lrquant.report.page import write_comparison, write_report

__version__ = "0.1.0"

_HOME = {
    "adapt": "lrquant.entrypoints.adapt",
    "Adapted": "lrquant.entrypoints.results",
    "quantize": "lrquant.entrypoints.quantize",
    "compare_predictions": "lrquant.entrypoints.evaluate",
    "evaluate": "lrquant.entrypoints.evaluate",
    "evaluate_answers": "lrquant.entrypoints.evaluate",
    "evaluate_images": "lrquant.entrypoints.evaluate",
    "Quantized": "lrquant.entrypoints.results",
    "load": "lrquant.loading.checkpoint",
    "Recipe": "lrquant.recipe",
    "LrquantError": "lrquant.errors",
    "UsageError": "lrquant.errors",
    "write_comparison": "lrquant.report.page",
    "write_report": "lrquant.report.page",
}

__all__ = [
    "Adapted",
    "LrquantError",
    "Quantized",
    "Recipe",
    "UsageError",
    "adapt",
    "compare_predictions",
    "evaluate",
    "evaluate_answers",
    "evaluate_images",
    "load",
    "quantize",
    "write_comparison",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lrquant' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


register_post_import_hook(register_configuration, "transformers.models.auto.configuration_auto")
register_post_import_hook(register_quantizer, "transformers.quantizers.auto")
