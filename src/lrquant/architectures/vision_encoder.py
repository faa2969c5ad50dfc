"""ViT's kind of block: LayerNorm before each sublayer, separate q, k, v, a two-layer MLP with GELU."""

from lrquant.architectures.layouts import separate, unpaired
from lrquant.transforms import Equivalence, NormToLinears, QueryKey, ValueToOutput


def vision_encoder(
    heads: int,
    head_dim: int,
    attention: str,
    output: str,
    attention_norm: str,
    mlp_norm: str,
    up: str = "mlp.fc1",
    shift_attention: bool = True,
) -> tuple[Equivalence, ...]:
    """Transformations of such a block. Positions enter before it, so every query channel has its own scale."""
    rows = separate(heads, 1, head_dim)
    query, key, value = (f"{attention}.{name}_proj" for name in "qkv")
    return (
        NormToLinears(attention_norm, (query, key, value), shift=shift_attention),
        NormToLinears(mlp_norm, (up,)),
        ValueToOutput(value, f"{attention}.{output}", rows.value, rows.output),
        QueryKey(query, key, rows.query, rows.key, unpaired(head_dim)),
    )
