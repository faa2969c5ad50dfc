"""Return values of `quantize` and `adapt`: the model or checkpoint, records of the run, and notes."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lrquant.architectures.family import found_notes
from lrquant.entrypoints.expert_notes import expert_notes
from lrquant.export import Sizes
from lrquant.formats.activation_quant import install
from lrquant.loading.original import Original
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_preparation import linear_input_args
from lrquant.reconstruction.coverage import Coverage
from lrquant.reconstruction.records import BlockRecord
from lrquant.reconstruction.result import Reconstruction


@dataclass
class Quantized:
    """A quantized model and the records of its run."""

    _model: Callable[[], Any]
    tokenizer: Any  # an image model's processor, a multimodal model's processor
    recipe: Recipe
    result: Reconstruction
    sizes: Sizes
    seconds: float
    peak_memory_bytes: int
    notes: list[str] = field(default_factory=list)
    saved_to: Path | None = None
    profile: dict[str, float] = field(default_factory=dict)  # seconds by part (lrquant.runtime.profile)
    coverage: Coverage | None = None  # which share of the model is quantized; None: weights are left alone

    @cached_property
    def model(self) -> Any:
        """The quantized model: the one changed in place, or the saved checkpoint, loaded on first access."""
        return self._model()

    @property
    def records(self) -> list[BlockRecord]:
        return self.result.records


@dataclass
class Adapted:
    """An adapted checkpoint and the records of its adaptation."""

    saved_to: Path
    recipe: Recipe  # how the chosen blocks were learned
    blocks: tuple[int, ...]  # those that were chosen
    records: list[BlockRecord]
    seconds: float


def keep_activations_quantized(model: Any, recipe: Recipe, result: Reconstruction) -> None:
    """Leave `model` computing as its checkpoint will."""
    for path in result.block_paths:
        block = model.get_submodule(path)
        inputs = linear_input_args(block, recipe.scheme.within(path), result.flat_inputs_within(path))
        install(inputs, block.modules(), recipe.scheme.attention_inputs if result.attention_quantized else None)
    if recipe.scheme.all_inputs:
        linears = {name: model.get_submodule(name) for name in result.outside.weights}
        schemes = {
            module: recipe.scheme.of(name).for_linear(module.in_features, name in result.outside.flat).input_activations
            for name, module in linears.items()
        }
        install(schemes, (), None)


def _words(own: Mapping[str, int | bool | None]) -> str:
    """`8 bits, group size 32` from a recipe's `formats`."""
    said = {"wbits": "weights of {} bits", "abits": "inputs of {} bits", "group_size": "groups of {}"}
    words = [said[name].format(value) for name, value in own.items() if name in said and value is not None]
    words += ["a scale for each row"] if own.get("group_size", 0) is None else []
    words += ["symmetric" if own["symmetric"] else "asymmetric"] if "symmetric" in own else []
    return ", ".join(words)


def notes_of(original: Original, recipe: Recipe, result: Reconstruction) -> list[str]:
    """Notes for the user about this result."""
    notes = found_notes(original.family.name, original.stages) if recipe.let else []
    if recipe.scheme.attention and not result.attention_quantized:
        notes.append("This family's attention cannot be quantized: queries, keys and values stay in floating point.")
    if recipe.scheme.kv_cache:
        notes.append("vLLM and lrquant.load quantize the key-value cache; plain transformers may not.")
    if recipe.scheme.attention and result.attention_quantized:
        notes.append(
            "lrquant.load quantizes queries, keys and values; plain transformers leaves them in floating point."
        )
    if result.added_biases:
        notes.append(
            "The shift needs biases that this family does not have: the checkpoint loads only after `import lrquant`."
        )
    if result.rotated.online:
        notes.append("Inputs are transformed at run time: the checkpoint loads only after `import lrquant`.")
    notes += expert_notes(result)
    notes += result.rotated.notes
    if recipe.dense:
        notes.append(
            f"Rotations of rank {recipe.rotation_rank} do not fold into scales: the checkpoint stores the rounded "
            "weights dense, in floating point, and saves no space. This is a research option."
        )
    notes += [f"Linears {pattern}: {_words(own)}." for pattern, own in recipe.formats.items()]
    if recipe.layer_bits:
        counts = Counter(recipe.layer_bits.values())
        spread = ", ".join(f"{counts[bits]} of {bits}" for bits in sorted(counts))
        notes.append(f"Bits of each linear were chosen by measured errors: {spread} bits; recipe.yaml lists them.")
    if result.tuning is not None:
        before, after = result.tuning.initial_loss, result.tuning.final_loss
        notes.append(
            f"End-to-end tuning of scales and norms: the divergence from the original went from "
            f"{before:.4g} to {after:.4g} nats per token."
        )
    elif recipe.tuning_epochs:
        notes.append("The model has no logits, so end-to-end tuning was skipped.")
    if result.zero:
        notes.append(f"All zero in the original, and so in the result: {', '.join(result.zero)}.")
    undone = [record.index for record in result.records if record.outcome == "kept initial"]
    if undone:
        notes.append(f"Learning did not help blocks {', '.join(map(str, undone))}: they keep their initial values.")
    recovered = [record.index for record in result.records if record.recoveries]
    if recovered:
        notes.append(f"Blocks {', '.join(map(str, recovered))} had a non-finite loss and returned to their best state.")
    stopped = [record for record in result.records if record.epochs_left]
    if stopped:
        epochs = sum(record.epochs_left for record in stopped)
        notes.append(
            f"The loss converged early in {len(stopped)} of {len(result.records)} blocks: {epochs} epochs were "
            f"skipped, which saved about {sum(record.seconds_saved for record in stopped):.0f} s."
        )
    return notes
