"""OPT: LayerNorm before each sublayer, biases everywhere, ReLU, learned positions."""

from typing import Any

from lrquant.architectures.family import Family, ResidualStream
from lrquant.architectures.layouts import separate, unpaired
from lrquant.transforms import Equivalence, NormToLinears, QueryKey, UpToDown, ValueToOutput

RESIDUAL = ResidualStream(("self_attn.out_proj", "fc2"), "fc2", ("embed_tokens", "embed_positions"), "final_layer_norm")


def equivalences(config: Any) -> tuple[Equivalence, ...]:
    head_dim = config.hidden_size // config.num_attention_heads
    heads = separate(config.num_attention_heads, 1, head_dim)
    query, key, value = (f"self_attn.{name}_proj" for name in "qkv")
    inside: tuple[Equivalence, ...] = (
        ValueToOutput(value, "self_attn.out_proj", heads.value, heads.output),
        QueryKey(query, key, heads.query, heads.key, unpaired(head_dim)),
    )
    if config.activation_function == "relu":
        inside += (UpToDown("fc1", "fc2"),)
    # OPT-350m: the norm's output is also the residual. Galactica: norms without weights, nothing to rescale.
    if not (config.do_layer_norm_before and config.layer_norm_elementwise_affine):
        return inside
    return (
        NormToLinears("self_attn_layer_norm", (query, key, value)),
        NormToLinears("final_layer_norm", ("fc1",)),
        *inside,
    )


FAMILY = Family("opt", ("opt",), "model.decoder.layers", equivalences, residual=RESIDUAL)
