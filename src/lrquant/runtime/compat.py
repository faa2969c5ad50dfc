"""Private names of torch and transformers that lrquant needs, each with the releases that have it."""

import re
from typing import Any


def passed_over_patterns(model: Any) -> list[re.Pattern[str]]:
    """Names of stored tensors that `model`'s class passes over on purpose (transformers 4 to 5.24)."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return [re.compile(pattern) for pattern in sorted(patterns)]
