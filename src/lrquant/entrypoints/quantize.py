"""The verbs: `quantize` and `evaluate`."""

import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lrquant.architectures import Family, MultimodalFamily, family_of
from lrquant.calibration.activation_cache import ActivationStore, Where
from lrquant.calibration.samples import samples_of
from lrquant.calibration.text import evaluation_ids, text_name
from lrquant.entrypoints.reporting import report_quantized
from lrquant.errors import UsageError
from lrquant.evaluation import Perplexity, perplexity
from lrquant.export import Sizes
from lrquant.export.compressed_tensors import block_tensors, check_layout, outside_tensors
from lrquant.export.saving import measure_sizes, quantized_outside, sizes_in_memory, write_checkpoint
from lrquant.export.shards import tensor_bytes
from lrquant.formats.activation_quant import install
from lrquant.formats.layout import checkpoint_dtype
from lrquant.loading.auto_class import modality_of
from lrquant.loading.block_source import BlockSource
from lrquant.loading.checkpoint import load
from lrquant.loading.offload import OffloadedBlocks, open_offloaded
from lrquant.loading.pretrained import (
    compute_dtype,
    fetched_folder,
    load_model,
    load_processor,
    pick_device,
    stored_dtype,
    window,
)
from lrquant.loading.validation import weight_files
from lrquant.recipe import Recipe
from lrquant.reconstruction import BlockRecord, Reconstruction, reconstruct
from lrquant.reconstruction.block_preparation import linear_input_args
from lrquant.reconstruction.callbacks import Callback, Callbacks
from lrquant.reconstruction.journal import Journal, SharedJournal
from lrquant.reconstruction.learnables import Learnables
from lrquant.report.observer import Observer
from lrquant.resume.fingerprint import difference, folder_digest, identity_of, module_digest
from lrquant.resume.journal import DiskJournal
from lrquant.resume.run_directory import RunDirectory, run_directory, run_folder
from lrquant.runtime.distributed import Ranks, check_batch, join, local_world
from lrquant.runtime.memory import PeakMemory
from lrquant.runtime.oom import advised, knobs
from lrquant.transforms.statistics import ChannelStatistics


@dataclass
class Quantized:
    """A quantized model in memory, and how it came about."""

    _model: Callable[[], Any]
    tokenizer: Any  # an image model's processor, a multimodal model's processor
    recipe: Recipe
    result: Reconstruction
    sizes: Sizes
    seconds: float
    peak_memory_bytes: int
    notes: list[str] = field(default_factory=list)
    saved_to: Path | None = None

    @cached_property
    def model(self) -> Any:
        """The quantized model: the one changed in place, or the saved checkpoint, loaded when it is asked for."""
        return self._model()

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
    callback: Callback | None = None,
    statistics: Sequence[dict[str, ChannelStatistics]] | None = None,
    start_from: Sequence[Learnables] | None = None,
    trust_remote_code: bool = False,
    report: bool = False,
    restart: bool = False,
    activations: Where = "auto",
    keep_model: bool | None = None,
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
        restart: throw away what an interrupted run left beside `save_dir`; else this one goes on from it.
        activations: where hidden states wait: `device`, `host`, `disk`, or `auto`.
        keep_model: leave the quantized model in memory; None: only when it is not saved. Otherwise
            `Quantized.model` loads it from `save_dir` when it is asked for, and `Quantized.result.learned` has no
            offsets of learned rounding, which are as large as the model.

    Raises:
        UsageError, LrquantError: one line each. `save_dir` appears whole or not at all; finished blocks are kept
            in a hidden folder beside it until it does.

    Under `torchrun` every rank makes the same call and they share the work (`lrquant.runtime.distributed`); the first
    writes.
    """
    began = time.perf_counter()
    memory = PeakMemory()
    recipe = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    if isinstance(calibration, str):
        recipe = recipe.changed(calibration=calibration)
    on = pick_device(device)
    ranks = join(on)
    count = recipe.nsamples if calibration is None or isinstance(calibration, str) else len(calibration)
    check_batch(recipe.batch_size, count, ranks, recipe.learns)
    saving = save_dir is not None
    with run_directory(save_dir, restart) if save_dir is not None and ranks.first else nullcontext() as run:
        dtype = compute_dtype(recipe.dtype, on)
        if isinstance(model_or_path, str | Path):
            base = str(model_or_path)
            streamed = None
            if saving and not keep_model and not recipe.also and not recipe.tuning_epochs:
                streamed = open_offloaded(base, dtype, recipe.towers, trust_remote_code)
            model = streamed[0] if streamed is not None else load_model(base, dtype, trust_remote_code)
            tokenizer = tokenizer or load_processor(base, modality_of(model), trust_remote_code)
            storage_dtype = checkpoint_dtype(recipe.scheme, stored_dtype(base, trust_remote_code))
        else:
            model, base = model_or_path.eval(), getattr(model_or_path, "name_or_path", "") or "a model in memory"
            storage_dtype = checkpoint_dtype(recipe.scheme, model.dtype)
            keep_model, streamed = True, None
        if getattr(model.config, "quantization_config", None):
            raise UsageError(f"{base}: already quantized; quantize the original model")
        family = family_of(model)
        check_layout(model, [f"{stage.path}.0" for stage in family.stages(model, recipe.towers)], recipe.stored_scheme)
        if calibration is None or isinstance(calibration, str):
            if tokenizer is None:
                raise UsageError("a model in memory needs its tokenizer or processor, or token ids as calibration")
            samples, recipe = samples_of(
                modality_of(model), tokenizer, recipe, lambda seqlen: window(model.config.get_text_config(), seqlen)
            )
        else:
            samples = [{"input_ids": row, "use_cache": False} for row in calibration]
            recipe = recipe.changed(nsamples=len(samples), calibration="token ids given in memory")
        keep = not saving or bool(keep_model) or recipe.tuning_epochs > 0
        block_source = streamed[1] if streamed is not None else BlockSource(model, keep)
        journal: Journal = Journal()
        files = Path(tempfile.gettempdir())
        if save_dir is not None:
            folder = fetched_folder(str(model_or_path)) if isinstance(model_or_path, str | Path) else None
            digest = module_digest(model) if folder is None else folder_digest(folder, weight_files(folder))
            given = {"given statistics": statistics, "given learned parameters": start_from}
            identity = identity_of(recipe, digest, samples, (dtype, storage_dtype), given)
            check_agreed(identity, ranks)
            if run is not None:
                run.claim(identity)
                journal = DiskJournal(run.folder, recipe.stored_scheme, storage_dtype)
            if run_folder(Path(save_dir)).is_dir():
                files = run_folder(Path(save_dir))
        observer = Observer() if report and ranks.first else None
        callbacks = (callback, observer) if ranks.first else ()
        streams = 2 + recipe.two_branch
        store = ActivationStore(activations, on, files, len(ranks.share(samples)), streams, local_world())
        asked: Recipe = recipe
        with advised(lambda: knobs(asked, store.where, dtype)):
            result = reconstruct(
                model,
                family,
                recipe,
                samples,
                on,
                storage_dtype,
                Callbacks(*(each for each in callbacks if each)),
                statistics,
                start_from,
                journal=journal if ranks.alone or not saving else SharedJournal(journal, ranks),
                block_source=block_source,
                store=store,
                ranks=ranks,
            )
        recipe = result.recipe
        if keep:
            _keep_activations_quantized(model, recipe, result)
        if not saving:
            sizes = sizes_in_memory(model, result, recipe.stored_scheme, storage_dtype)
        else:
            written: dict[str, Any] = {}
            if run is not None and isinstance(journal, DiskJournal):
                written = asdict(_saved(run, journal, block_source, tokenizer, result, recipe, storage_dtype, base))
            sizes = Sizes(**json.loads(ranks.text(json.dumps(written))))
        notes = _notes(family, recipe, result)
        notes += journal.damaged if isinstance(journal, DiskJournal) else []
    target = Path(save_dir) if save_dir is not None else None
    quantized = Quantized(
        (lambda: model) if keep else (lambda: load(str(target), dtype, trust_remote_code)),
        tokenizer,
        recipe,
        result,
        sizes,
        time.perf_counter() - began,
        memory.peak_bytes(),
        notes,
        target,
    )
    if observer is not None and target is not None:
        report_quantized(quantized, observer, base, f"lrquant.quantize({base!r}, …)", on)
    return quantized


def check_agreed(identity: dict[str, str], ranks: Ranks) -> None:
    """Raise on a rank that was given something else than the first one."""
    theirs = json.loads(ranks.text(json.dumps(identity)))
    changed = difference(theirs, identity)
    if changed:
        raise UsageError(f"rank {ranks.rank} was not given what the first rank was: {changed}")


def _saved(
    run: RunDirectory,
    journal: DiskJournal,
    block_source: BlockSource,
    tokenizer: Any,
    result: Reconstruction,
    recipe: Recipe,
    storage_dtype: torch.dtype,
    base: str,
) -> Sizes:
    """Put the checkpoint in its place, unless it is there."""
    model = block_source.model
    weights, bits = journal.quantized_size()
    more = quantized_outside(model, result, recipe.stored_scheme, storage_dtype)
    read = block_source.read if isinstance(block_source, OffloadedBlocks) else None

    def sizes_of(checkpoint_bytes: int) -> Sizes:
        return measure_sizes(model, checkpoint_bytes, weights + more[0], bits + more[1], result.rotated.untied)

    def write(folder: Path) -> None:
        outside = outside_tensors(model, result, recipe.stored_scheme, storage_dtype, read)
        tuned = block_tensors(model, result, recipe.stored_scheme, storage_dtype)
        groups = itertools.chain(outside, tuned if result.frozen else journal.checkpoint_tensors())
        write_checkpoint(folder, model, tokenizer, result, recipe, storage_dtype, base, groups, sizes_of)

    if not run.is_placed():
        run.place(write)
    return sizes_of(tensor_bytes(run.target))


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
    with everything quantized, attention inputs included. Under `torchrun` every rank makes the same call and takes its
    share of the windows; all get the values.
    """
    on = pick_device(device)
    ranks = join(on)
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
        return {
            name: perplexity(model, tokens, seqlen, limit_windows, told=told, ranks=ranks)
            for name, tokens in ids.items()
        }
    finally:
        model.to(home)


def _keep_activations_quantized(model: Any, recipe: Recipe, result: Reconstruction) -> None:
    """Leave `model` computing as its checkpoint will."""
    for path in result.block_paths:
        block = model.get_submodule(path)
        inputs = linear_input_args(block, recipe.scheme.inputs, recipe, result.flat_inputs_within(path))
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
    if result.rotated.online:
        notes.append("Inputs are transformed at run time: the checkpoint loads only after `import lrquant`.")
    notes += result.rotated.notes
    if recipe.dense:
        notes.append(
            f"Rotations of rank {recipe.rotation_rank} fold into no scale: the checkpoint holds the rounded weights "
            "dense, in floating point, and saves no space. It is for research."
        )
    if recipe.layer_bits:
        counts = Counter(recipe.layer_bits.values())
        spread = ", ".join(f"{counts[bits]} of {bits}" for bits in sorted(counts))
        notes.append(f"Bits of the linears follow from measured errors: {spread} bits; recipe.yaml names each.")
    if result.tuning is not None:
        before, after = result.tuning.initial_loss, result.tuning.final_loss
        notes.append(
            f"At last, scales and norms were learned for the whole model: its divergence from the original went from "
            f"{before:.4g} to {after:.4g} nats a token."
        )
    elif recipe.tuning_epochs:
        notes.append("The model answers without logits: it was not tuned as a whole.")
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
