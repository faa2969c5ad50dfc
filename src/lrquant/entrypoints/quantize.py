"""The function `quantize`: runs a recipe on a model and writes the checkpoint."""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import starmap
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from lrquant.architectures.targets import has_exposed
from lrquant.calibration.activation_cache import Where
from lrquant.entrypoints.preparation import PreparedRun, check_result, pick_machine, prepare
from lrquant.entrypoints.reporting import Subject, report_quantized
from lrquant.entrypoints.results import Quantized, keep_activations_quantized, notes_of
from lrquant.errors import UsageError
from lrquant.export import Sizes
from lrquant.export.expert_layout import in_own_layout
from lrquant.export.packing import Packer
from lrquant.export.rehearsal import check_loads
from lrquant.export.saving import About, measure_sizes, sizes_in_memory, write_checkpoint
from lrquant.export.shards import tensor_bytes
from lrquant.loading.auto_class import auto_model
from lrquant.loading.checkpoint import load
from lrquant.loading.offload import OffloadedBlocks
from lrquant.loading.original import Original
from lrquant.loading.pretrained import fetched_folder
from lrquant.loading.validation import weight_files
from lrquant.passes.pipeline import carry_out
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_reconstruction import Learn
from lrquant.reconstruction.block_window import providers_of
from lrquant.reconstruction.callbacks import Callback, Callbacks
from lrquant.reconstruction.coverage import Coverage
from lrquant.reconstruction.journal import Journal, SharedJournal
from lrquant.reconstruction.learnables import Learnables
from lrquant.reconstruction.result import Reconstruction
from lrquant.report.observer import Observer
from lrquant.resume.fingerprint import difference, folder_digest, identity_of, module_digest
from lrquant.resume.journal import DiskJournal
from lrquant.resume.run_directory import RunDirectory, run_directory, run_folder
from lrquant.runtime.distributed import Ranks
from lrquant.runtime.memory import PeakMemory
from lrquant.runtime.paths import public_name
from lrquant.runtime.profile import profiling, timed
from lrquant.transforms.statistics import ChannelStatistics


class Options(TypedDict, total=False):
    """How `quantize` runs a recipe. Only `statistics` and `start_from` change the result.

    tokenizer: of a model in memory, or its processor; not needed where `calibration` is token ids.
    device: `auto` (an accelerator if there is one), `cpu`, `cuda:1`, …
    trust_remote_code: whether code that comes with the model may run; False unless given.
    activations: where hidden states are kept: `device`, `host`, `disk`, or `auto`.
    keep_model: leave the quantized model in memory; None: only when it is not saved. Otherwise `Quantized.model` loads
        it from `save_dir` when it is asked for, and `Quantized.result.learned` has no offsets of learned rounding,
        which are as large as the model.
    restart: discard an interrupted run of `save_dir` instead of resuming it.
    report: write `report.html` to `save_dir`; the command line does so by default, and adds its measurements.
    statistics: channel statistics of an earlier run (`Quantized.result.statistics`) to start smoothing from.
    start_from: learned parameters of an earlier run (`Quantized.result.learned`), one mapping per block, in place of
        the initial transformation; with `epochs` 0 they are used as they are.
    """

    tokenizer: Any
    device: str
    trust_remote_code: bool
    activations: Where
    keep_model: bool | None
    restart: bool
    report: bool
    statistics: Sequence[dict[str, ChannelStatistics]] | None
    start_from: Sequence[Learnables] | None


def quantize(
    model_or_path: Any,
    recipe: Recipe | str = "lrquant",
    calibration: str | Sequence[torch.Tensor] | None = None,
    *,
    save_dir: str | Path | None = None,
    callback: Callback | None = None,
    **options: Unpack[Options],
) -> Quantized:
    """Quantize a language, vision or multimodal model, block by block, and save it if `save_dir` is given.

    >>> lrquant.quantize("zoo:llama", lrquant.Recipe.preset("lrquant", wbits=4, abits=4,
    ...                  calibration="zoo:pydoc", nsamples=32, seqlen=256), save_dir="llama-w4a4")

    Args:
        model_or_path: a hub name, a local folder, `zoo:NAME`, or a transformers model, which is changed in place.
        recipe: a `Recipe` or a preset's name.
        calibration: text, images or dialogues by name or path, or token ids, (1, tokens) each; None: the recipe's.
        callback: is called as the run progresses (`lrquant.reconstruction.callbacks`).
        options: `Options`.

    Raises:
        UsageError, LrquantError: one line each. `save_dir` appears complete or not at all; until then, finished blocks
            are kept in a hidden folder beside it.

    Under `torchrun`, every rank makes the same call. The ranks share the work (`lrquant.runtime.distributed`), and the
    first one writes the result.
    """
    began, memory = time.perf_counter(), PeakMemory()
    _check_options(options)
    asked = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    target = Path(save_dir) if save_dir is not None else None
    machine = pick_machine(asked, options.get("device", "auto"))
    observer = Observer() if options.get("report") and machine.ranks.first else None
    writes = target is not None and machine.ranks.first
    held = run_directory(target, options.get("restart", False)) if writes and target else nullcontext()
    with profiling() as profile, held as directory:
        prepared = prepare(
            model_or_path,
            asked,
            machine,
            calibration=calibration,
            in_memory=target is None or bool(options.get("keep_model")),
            processor=options.get("tokenizer"),
            trust_remote_code=options.get("trust_remote_code", False),
        )
        if target is not None:
            check_result(prepared)
        writing = _Writing(prepared, target, directory)
        writing.claim(model_or_path, options)
        heard = [each for each in (callback, observer) if each is not None and machine.ranks.first]
        callbacks = Callbacks(*heard)
        if directory is not None:
            callbacks.run_folder(directory.folder)
        result = _carried_out(prepared, writing, callback=callbacks, options=options)
        sizes = writing.save(result)
        notes = [*prepared.notes, *notes_of(prepared.original, result.recipe, result), *writing.damaged]
    name, trust = prepared.original.name, options.get("trust_remote_code", False)
    model, keeps = prepared.original.model, prepared.original.block_source.keeps
    quantized = Quantized(
        (lambda: model) if keeps else (lambda: load(str(target), machine.dtype, trust)),
        prepared.original.processor,
        result.recipe,
        result,
        sizes,
        time.perf_counter() - began,
        memory.peak_bytes(),
        notes,
        target,
        profile.seconds(),
        prepared.coverage,
    )
    if observer is not None and target is not None:
        report_quantized(quantized, observer, Subject(name, f"lrquant.quantize({name!r}, …)", machine.device))
    return quantized


def _check_options(options: Options) -> None:
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown argument {min(unknown)!r}: there are {', '.join(Options.__annotations__)}")


def _carried_out(prepared: PreparedRun, writing: "_Writing", *, callback: Callback, options: Options) -> Reconstruction:
    """Run the passes. A model that stays in memory then computes as its checkpoint will."""
    cache = prepared.cache(options.get("activations", "auto"), writing.folder)
    learn, blocks = Learn(options.get("statistics"), options.get("start_from")), len(prepared.original.places)
    if learn.start_from is not None and len(learn.start_from) != blocks:
        raise UsageError(f"saved parameters of {len(learn.start_from)} blocks for a model of {blocks}")
    with prepared.advising(cache):
        providers = providers_of(prepared.recipe, learn)
        run = prepared.run(cache, journal=writing.journal, callback=callback, providers=providers)
        result = carry_out(run)
    result.own_layout = in_own_layout(prepared.original.model, result)
    if prepared.original.block_source.keeps:
        keep_activations_quantized(prepared.original.model, result.recipe, result)
    return result


class _Writing:
    """Writes the files of a run: finished blocks during the run, and the checkpoint at its end.

    Args:
        target: the save directory; None: nothing is written.
        directory: the run's own folder, on the rank that writes.
    """

    def __init__(self, prepared: PreparedRun, target: Path | None, directory: RunDirectory | None) -> None:
        self._prepared, self._target, self._directory = prepared, target, directory
        scheme, storage_dtype = prepared.recipe.stored_scheme, prepared.original.storage_dtype
        self._disk = DiskJournal(directory.folder, scheme, storage_dtype) if directory is not None else None

    @property
    def folder(self) -> Path:
        """The folder for files during the run."""
        found = run_folder(self._target) if self._target is not None else None
        return found if found is not None and found.is_dir() else Path(tempfile.gettempdir())

    @property
    def journal(self) -> Journal:
        """The journal of finished blocks: on disk if the result is saved, for all ranks."""
        own, ranks = self._disk or Journal(), self._prepared.machine.ranks
        return own if ranks.alone or self._target is None else SharedJournal(own, ranks)

    @property
    def damaged(self) -> list[str]:
        """Describes the damaged files of an earlier run."""
        return self._disk.damaged if self._disk is not None else []

    def claim(self, model_or_path: Any, options: Options) -> None:
        """Claim the run's folder for this run.

        Raises:
            UsageError: another unfinished run is there, or this rank has other arguments.
        """
        if self._target is None:
            return
        prepared, machine = self._prepared, self._prepared.machine
        folder = fetched_folder(str(model_or_path)) if isinstance(model_or_path, str | Path) else None
        model = prepared.original.model
        digest = module_digest(model) if folder is None else folder_digest(folder, weight_files(folder))
        given = {
            "given statistics": options.get("statistics"),
            "given learned parameters": options.get("start_from"),
        }
        dtypes = machine.dtype, prepared.original.storage_dtype
        identity = identity_of(prepared.asked, digest, prepared.samples, dtypes, given)
        check_agreed(identity, machine.ranks)
        if self._directory is not None:
            self._directory.claim(identity)

    @timed("write")
    def save(self, result: Reconstruction) -> Sizes:
        """Write the checkpoint, unless it exists already; returns its size on disk, or the size that it would have."""
        original, ranks = self._prepared.original, self._prepared.machine.ranks
        if self._target is None:
            return sizes_in_memory(original.model, result, original.storage_dtype)
        written: dict[str, Any] = {}
        if self._directory is not None and self._disk is not None:
            coverage = self._prepared.coverage
            written = asdict(_saved(self._directory, self._disk, original, result=result, coverage=coverage))
        return Sizes(**json.loads(ranks.text(json.dumps(written))))


def check_agreed(identity: dict[str, str], ranks: Ranks) -> None:
    """Raise on a rank whose arguments differ from those of the first one."""
    theirs = json.loads(ranks.text(json.dumps(identity)))
    changed = difference(theirs, identity)
    if changed:
        raise UsageError(f"rank {ranks.rank} has other arguments than the first rank: {changed}")


def _saved(
    directory: RunDirectory,
    journal: DiskJournal,
    original: Original,
    *,
    result: Reconstruction,
    coverage: Coverage | None,
) -> Sizes:
    """Put the checkpoint in its place, unless it is there."""
    model, storage_dtype = original.model, original.storage_dtype
    packer = Packer(model, result.recipe.stored_scheme, storage_dtype)
    read = original.block_source.read if isinstance(original.block_source, OffloadedBlocks) else None

    def sizes_of(checkpoint_bytes: int) -> Sizes:
        return measure_sizes(packer, checkpoint_bytes, result.rotated.untied)

    def groups() -> Iterator[dict[str, torch.Tensor]]:
        yield from packer.outside(result, read)
        yield from packer.blocks(result) if result.frozen else starmap(packer.block, journal.frozen_blocks())

    def write(folder: Path) -> None:
        about = About(public_name(original.name), original.processor, original.tensors, coverage)
        write_checkpoint(
            folder, model, result, groups=groups(), storage_dtype=storage_dtype, about=about, sizes_of=sizes_of
        )
        loader = auto_model(model.config) if result.needs_lrquant else type(model)
        merges = has_exposed(model) and not result.own_layout
        check_loads(folder, loader, original.tensors.carried, merges=merges)

    if directory.is_placed():
        for _ in groups():  # counts
            pass
    else:
        directory.place(write)
    return sizes_of(tensor_bytes(directory.target))
