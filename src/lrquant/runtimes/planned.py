"""The number format that a recipe will write."""

from compressed_tensors.quantization import QuantizationArgs

from lrquant.formats.layout import pads_zero_points, storage_format
from lrquant.recipe import Recipe
from lrquant.runtimes.stored_format import Numbers, StoredFormat

_MIXED = tuple(range(2, 9))  # bits that linears of a run under a size budget may get


def numbers_of(args: QuantizationArgs | None) -> Numbers | None:
    """The numbers that compressed-tensors' `args` describe; None: they are not quantized."""
    return None if args is None else Numbers.of(args.model_dump(mode="json"))


def _bits_of_linears(recipe: Recipe) -> set[int]:
    """Bits of weights, where the recipe says that linears differ."""
    own = {int(own.get("wbits") or recipe.wbits) for own in recipe.formats.values()}
    return set((recipe.layer_bits or {}).values()) | (own | {recipe.wbits} if own - {recipe.wbits} else set())


def format_of_recipe(recipe: Recipe, model_type: str | None = None) -> StoredFormat:
    """The numbers of a checkpoint that `recipe` makes of a model of this type."""
    scheme = recipe.stored_scheme
    mixed = _MIXED if recipe.target_bits is not None else ()
    return StoredFormat(
        weights=numbers_of(scheme.weights),
        inputs=numbers_of(scheme.inputs),
        container=storage_format(scheme).value,
        pads_zero_points=pads_zero_points(scheme),
        attention=scheme.attention is not None,
        needs_lrquant="down" in recipe.rotate,
        all_bits=tuple(sorted(_bits_of_linears(recipe))) or mixed,
        model_type=model_type,
    )
