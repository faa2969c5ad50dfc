"""The verbs: `quantize` and `evaluate`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lrquant.api_report import report_quantized
from lrquant.architectures import Family, MultimodalFamily, family_of
from lrquant.calibration.samples import samples_of
from lrquant.calibration.text import evaluation_ids, text_name
from lrquant.checkpoints import Sizes, check_save_dir, load, save
from lrquant.checkpoints.packing import checkpoint_tensors
from lrquant.checkpoints.saving import measure_sizes
from lrquant.errors import UsageError
from lrquant.evaluation import Perplexity, perplexity
from lrquant.formats.activations import install
from lrquant.memory import PeakMemory
from lrquant.modality import modality_of
from lrquant.models import compute_dtype, load_model, load_processor, pick_device, stored_dtype, window
from lrquant.recipe import Recipe
from lrquant.reconstruction import BlockRecord, Reconstruction, reconstruct
from lrquant.reconstruction.engine import flat_inputs_within, linear_input_args
from lrquant.reconstruction.learning import Learnables
from lrquant.report.observer import Observer
from lrquant.transforms.statistics import ChannelStatistics
from lrquant.watching import Watcher, Watchers


@dataclass
class Quantized:
    """A quantized model in memory, and how it came about."""

    model: Any
    tokenizer: Any  # an image model's processor, a multimodal model's processor
    recipe: Recipe
    result: Reconstruction
    sizes: Sizes
    seconds: float
    peak_memory_bytes: int
    notes: list[str] = field(default_factory=list)
    saved_to: Path | None = None

    @property
    def records(self) -> list[BlockRecord]:
        return self.result.records


def quantize(
    model_or_path: Any,
    recipe: Recipe | str = "lrquant",
    calibration: str | Sequence[torch.Tensor] | None = None,
    save_dir: str | Path | None = None,
    tokenizer: Any = None,
    device: str = "auto",
    watcher: Watcher | None = None,
    statistics: Sequence[dict[str, ChannelStatistics]] | None = None,
    start_from: Sequence[Learnables] | None = None,
    trust_remote_code: bool = False,
    report: bool = False,
) -> Quantized:
    """Quantize a language, vision or multimodal model, block by block, and save it when `save_dir` is given.

    >>> lrquant.quantize("zoo:llama", lrquant.Recipe.preset("lrquant", wbits=4, abits=4,
    ...                  calibration="zoo:pydoc", nsamples=32, seqlen=256), save_dir="llama-w4a4")

    Args:
        model_or_path: a hub name, a local folder, `zoo:NAME`, or a transformers model, which is changed in
            place (then give its `tokenizer` or processor, unless `calibration` is token ids).
        recipe: a `Recipe` or a preset's name.
        calibration: text, pictures or dialogues by name or path, or token ids, (1, tokens) each; None: the recipe's.
        statistics: channel statistics of an earlier run (`Quantized.result.statistics`) to start smoothing from.
        start_from: learned parameters of an earlier run (`Quantized.result.learned`), one mapping per block, in place
            of the initial transformation; with `epochs` 0 they are used as they are.
        report: leave `report.html` in `save_dir`; the command line always does, with what it measures besides.

    Raises:
        UsageError, LrquantError: one line each; nothing is left behind.
    """
    began = time.perf_counter()
    memory = PeakMemory()
    recipe = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    if isinstance(calibration, str):
        recipe = recipe.changed(calibration=calibration)
    target = check_save_dir(save_dir) if save_dir is not None else None
    on = pick_device(device)
    dtype = compute_dtype(recipe.dtype, on)
    if isinstance(model_or_path, str | Path):
        base = str(model_or_path)
        model = load_model(base, dtype, trust_remote_code)
        tokenizer = tokenizer or load_processor(base, modality_of(model), trust_remote_code)
        storage_dtype = stored_dtype(base, trust_remote_code)
    else:
        model, base = model_or_path.eval(), getattr(model_or_path, "name_or_path", "") or "a model in memory"
        storage_dtype = model.dtype
    if getattr(model.config, "quantization_config", None):
        raise UsageError(f"{base}: already quantized; quantize the original model")
    family = family_of(model)
    if calibration is None or isinstance(calibration, str):
        if tokenizer is None:
            raise UsageError("a model in memory needs its tokenizer or processor, or token ids as calibration")
        samples, recipe = samples_of(
            modality_of(model), tokenizer, recipe, lambda seqlen: window(model.config.get_text_config(), seqlen)
        )
    else:
        samples = [{"input_ids": row, "use_cache": False} for row in calibration]
        recipe = recipe.changed(nsamples=len(samples), calibration="token ids given in memory")
    observer = Observer() if report else None
    watchers = Watchers(*(each for each in (watcher, observer) if each))
    result = reconstruct(model, family, recipe, samples, on, storage_dtype, watchers, statistics, start_from)
    recipe = result.recipe
    notes = _notes(family, recipe, result)
    _keep_activations_quantized(model, recipe, result)
    if target is not None:
        sizes = save(target, model, tokenizer, result, recipe, storage_dtype, base)
    else:
        tensors = checkpoint_tensors(model, result, recipe.stored_scheme, storage_dtype)
        sizes = measure_sizes(model, result, tensors)
    quantized = Quantized(
        model, tokenizer, recipe, result, sizes, time.perf_counter() - began, memory.peak_bytes(), notes, target
    )
    if observer is not None and target is not None:
        report_quantized(quantized, observer, base, f"lrquant.quantize({base!r}, …)", on)
    return quantized


def evaluate(
    model_or_path: Any,
    texts: Sequence[str],
    seqlen: int | None = None,
    limit_windows: int | None = None,
    tokenizer: Any = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Perplexity]:
    """Perplexity of a model on each of `texts`, keyed by the set's or the file's name.

    `told(windows just done, windows of this text)` hears of progress. A quantized checkpoint of lrquant's is evaluated
    with everything quantized, attention inputs included.
    """
    on = pick_device(device)
    if isinstance(model_or_path, str | Path):
        model = load(str(model_or_path), compute_dtype(dtype, on), trust_remote_code)
        tokenizer = tokenizer or load_processor(str(model_or_path), modality_of(model), trust_remote_code)
    else:
        model = model_or_path
    if tokenizer is None:
        raise UsageError("a model in memory needs its tokenizer to be evaluated on text")
    if modality_of(model) == "image":
        raise UsageError("this model takes image, not text: it has no perplexity")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a multimodal model's is part of its processor
    seqlen = window(model.config.get_text_config(), seqlen)
    ids = {text_name(text): evaluation_ids(tokenizer, text) for text in texts}
    home = next(model.parameters()).device
    model.to(on)
    try:
        return {name: perplexity(model, tokens, seqlen, limit_windows, told=told) for name, tokens in ids.items()}
    finally:
        model.to(home)


def _keep_activations_quantized(model: Any, recipe: Recipe, result: Reconstruction) -> None:
    """Leave `model` computing as its checkpoint will."""
    for path in result.block_paths:
        block = model.get_submodule(path)
        inputs = linear_input_args(block, recipe.scheme.inputs, recipe, flat_inputs_within(result, path))
        install(inputs, block.modules(), recipe.scheme.attention if result.attention_quantized else None)
    if recipe.scheme.inputs is not None:
        linears = {name: model.get_submodule(name) for name in result.outside.weights}
        schemes = {
            module: recipe.scheme.for_linear(module.in_features, name in result.outside.flat).input_activations
            for name, module in linears.items()
        }
        install(schemes, (), None)


def _notes(family: Family | MultimodalFamily, recipe: Recipe, result: Reconstruction) -> list[str]:
    """What a user should know of this result besides its numbers."""
    notes = []
    if isinstance(family, Family) and not family.known:
        notes.append(f"Model type {family.name!r} is not known: weight clipping only, no smoothing.")
    if recipe.scheme.attention and not result.attention_quantized:
        notes.append("This family's attention cannot be quantized: queries, keys and values stay in floating point.")
    if result.attention_quantized:
        notes.append(
            "Queries, keys and values are quantized by lrquant.load; plain transformers leaves them in floating point."
        )
    if result.added_biases:
        notes.append("The shift needs biases that this family lacks: the checkpoint loads only after `import lrquant`.")
    if recipe.dense:
        notes.append(
            f"Rotations of rank {recipe.rotation_rank} fold into no scale: the checkpoint holds the rounded weights "
            "dense, in floating point, and saves no space. It is for research."
        )
    undone = [record.index for record in result.records if record.outcome == "kept initial"]
    if undone:
        notes.append(
            f"Learning did not help blocks {', '.join(map(str, undone))}: they keep their initial transformation."
        )
    recovered = [record.index for record in result.records if record.recoveries]
    if recovered:
        notes.append(f"Blocks {', '.join(map(str, recovered))} met a non-finite loss and were set back.")
    stopped = [record for record in result.records if record.epochs_left]
    if stopped:
        epochs = sum(record.epochs_left for record in stopped)
        notes.append(
            f"The loss flattened early in {len(stopped)} of {len(result.records)} blocks: {epochs} epochs were left "
            f"out, about {sum(record.seconds_saved for record in stopped):.0f} s."
        )
    return notes
