"""ViT's kind of block: LayerNorm before each sublayer, separate q, k, v, a two-layer MLP with GELU."""

from lrquant.architectures.layouts import separate, unpaired
from lrquant.transforms import Equivalence, NormToLinears, QueryKey, ValueToOutput


def vision_encoder(
    heads: int,
    head_dim: int,
    *,
    attention: str,
    output: str,
    norms: tuple[str, str],
    shift_attention: bool = True,
) -> tuple[Equivalence, ...]:
    """Transformations of such a block, whose `norms` stand before attention and the MLP.

    Positions enter before the block, so every query channel has its own scale.
    """
    rows = separate(heads, 1, head_dim)
    query, key, value = (f"{attention}.{name}_proj" for name in "qkv")
    return (
        NormToLinears(norms[0], (query, key, value), shift=shift_attention),
        NormToLinears(norms[1], ("mlp.fc1",)),
        ValueToOutput(value, f"{attention}.{output}", rows.value, rows.output),
        QueryKey(query, key, rows.query, rows.key, unpaired(head_dim)),
    )
