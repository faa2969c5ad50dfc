"""Settings that `lrquant quantize MODEL` chooses if no others are given, and the words that explain them.

The format is one that most programs run: 4-bit weights in groups, 16-bit activations. The calibration set is available
on this machine.
"""

from collections.abc import Mapping
from typing import Any

from lrquant.calibration.images import ZOO_PICTURES
from lrquant.calibration.text import read_text
from lrquant.errors import LrquantError
from lrquant.formats.presets import FORMATS
from lrquant.recipe import Recipe
from lrquant.settings import Panel, setting_of

FORMAT = "w4a16-g128"
GROUP_SIZES = (128, 64, 32)  # those that programs have kernels for; larger groups give smaller checkpoints
DEFAULT_CALIBRATION = Recipe.model_fields["calibration"].default
OFFLINE_TEXT = "zoo:pydoc"
# Without an accelerator, learning takes hours for larger models. Rounding takes seconds and needs few samples.
ON_A_CPU: dict[str, Any] = {"method": "rtn", "nsamples": 8, "seqlen": 512}
_DECIDED = {Panel.TARGET, Panel.FORMAT, Panel.METHOD, Panel.LEARNING}
_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "ffn_dim", "q_lora_rank", "kv_lora_rank")


def decides(given: Mapping[str, Any]) -> bool:
    """Whether `given` has settings of the target, the format, the method or learning."""
    fields = Recipe.model_fields
    return any(setting_of(name, fields[name]).panel in _DECIDED for name in given if name in fields)


def chosen_format(config: Any, device_type: str) -> tuple[dict[str, Any], str]:
    """Settings of method and number format for a model of `config`, and the words that explain them.

    The group size is the largest that divides the model's widths, as far as the configuration names them.
    """
    text = config.get_text_config()
    widths = [getattr(text, name, None) for name in _WIDTHS]
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and isinstance(getattr(text, "head_dim", None), int):
        widths.append(heads * text.head_dim)
    known = [width for width in widths if isinstance(width, int) and width > 0]
    group = next((size for size in GROUP_SIZES if known and all(width % size == 0 for width in known)), None)
    values = FORMATS[FORMAT] | {"group_size": group}
    bits = f"4-bit weights with {f'groups of {group}' if group else 'one scale per row'} (--format)"
    if device_type != "cpu":
        return values, f"{bits}, method lrquant (--method)"
    longest = getattr(text, "max_position_embeddings", None) or ON_A_CPU["seqlen"]
    values |= ON_A_CPU | {"seqlen": min(ON_A_CPU["seqlen"], longest)}
    return values, f"{bits}, method rtn because there is no accelerator (--method lrquant learns, but takes longer)"


def chosen_calibration(config: Any) -> tuple[str, str]:
    """A calibration set for a model of `config` that is available, and the words that explain it.

    The recipe's own default if the hub has it, the bundled text if the hub cannot be reached, and the bundled images
    for a model without text.
    """
    if not getattr(config.get_text_config(), "vocab_size", None):
        return ZOO_PICTURES, f"calibration on {ZOO_PICTURES} (--calib)"
    try:
        read_text(DEFAULT_CALIBRATION, train=True)
    except LrquantError:
        return OFFLINE_TEXT, f"calibration on {OFFLINE_TEXT} because the hub is unreachable (--calib)"
    return DEFAULT_CALIBRATION, f"calibration on {DEFAULT_CALIBRATION} (--calib)"
