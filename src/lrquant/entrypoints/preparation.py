"""The common start of quantize, adapt and the dry run: a model, a resolved recipe and matching samples.

open      the machine, the original in its precision, with its blocks in memory or on disk
sample    keyword arguments of calls, from the recipe's source or from token ids
resolve   the recipe with nothing left to be chosen
check     what the run would refuse is refused here, before anything is changed or written
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrquant.architectures.targets import linears_of
from lrquant.calibration.activation_cache import ActivationStore
from lrquant.calibration.samples import TokenIds, samples_of, text_samples
from lrquant.calibration.text import check_vocabulary
from lrquant.entrypoints.choice import check_choice
from lrquant.entrypoints.resolve import resolve
from lrquant.errors import UsageError
from lrquant.export.rehearsal import rehearse
from lrquant.export.whole_weights import check_layout
from lrquant.loading.original import Original, open_original
from lrquant.loading.pretrained import compute_dtype, pick_device, window
from lrquant.passes.non_block_modules import chosen_modules
from lrquant.passes.pipeline import check_passes, needs_blocks, needs_model
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_preparation import check_group_size
from lrquant.reconstruction.coverage import Coverage, coverage_of
from lrquant.reconstruction.run import Run
from lrquant.runtime.distributed import ALONE, Ranks, check_batch, join, local_world
from lrquant.runtime.execution import Machine
from lrquant.runtime.oom import advised, knobs
from lrquant.runtime.profile import timed


@dataclass(frozen=True)
class PreparedRun:
    """A model, a resolved recipe and samples that match, with all checks done.

    It takes no memory besides the model, which is still unchanged.
    """

    original: Original
    asked: Recipe  # before it was resolved
    recipe: Recipe
    samples: Sequence[dict[str, Any]]  # keyword arguments of single-sample calls, those of all ranks
    machine: Machine

    @property
    def streams(self) -> int:
        """The number of streams of hidden states held at the same time; a window of blocks needs two more."""
        return 2 + self.recipe.two_branch + 2 * (self.recipe.window > 1)

    @cached_property
    def keeps_blocks(self) -> bool:
        return needs_blocks(self.recipe)

    @cached_property
    def coverage(self) -> Coverage | None:
        """Which share of the model is quantized; None: weights are left alone."""
        return covered(self.original, self.recipe)

    @property
    def notes(self) -> list[str]:
        """What a user should know before the run, the most important first."""
        notes = []
        if self.coverage is not None and (warning := self.coverage.warning()):
            notes.append(warning)
        threads, cores = self.asked.threads, os.cpu_count()
        if threads is not None and cores is not None and threads > cores:
            notes.append(f"The recipe asks for {threads} CPU threads, more than the {cores} cores here, which is slow.")
        return [*notes, *self.original.notes]

    def cache(self, activations: Any = "auto", folder: Path = Path(), samples: int | None = None) -> ActivationStore:
        """The cache for this rank's streams; `samples`: their number, if not all of its share."""
        share = len(self.machine.ranks.share(self.samples)) if samples is None else samples
        return ActivationStore(activations, self.machine.device, folder, share, self.streams, local_world())

    def run(self, cache: ActivationStore, **services: Any) -> Run:
        """The prepared run; `services` are arguments of `Run`: a journal, a callback, providers."""
        given = {"keeps_blocks": self.keeps_blocks} | services
        return Run(self.original, self.recipe, self.samples, self.machine, cache, **given)

    def advising(self, cache: ActivationStore) -> Any:
        """A context in which running out of memory becomes a one-line error that names the options that help."""
        recipe, dtype = self.recipe, self.machine.dtype
        return advised(lambda: knobs(recipe.batch_size, recipe.seqlen, cache.where, dtype=dtype))


def pick_machine(recipe: Recipe, device: str, *, shared: bool = True) -> Machine:
    """The device called `device`, the precision of the recipe there, and the other ranks, if work is shared with them.

    Raises:
        UsageError: there is no such device.
    """
    found = pick_device(device)
    return Machine(found, compute_dtype(recipe.dtype, found), join(found) if shared else ALONE)


@timed("load")
def prepare(
    model_or_path: Any,
    recipe: Recipe,
    machine: Machine,
    *,
    calibration: str | Sequence[torch.Tensor] | TokenIds | None = None,
    in_memory: bool = True,
    processor: Any = None,
    trust_remote_code: bool = False,
) -> PreparedRun:
    """Open the model, take the samples, resolve the recipe, and check that they match.

    Args:
        model_or_path: a hub name, a local folder, `zoo:NAME`, or a transformers model.
        calibration: a source by name or path, or token ids, (1, tokens) each; None: the recipe's.
        in_memory: whether to keep the quantized model in memory. If not, the blocks of a model given by name stay on
            disk until they are needed, if the model and the recipe's passes allow it.

    Raises:
        UsageError, LrquantError: one line each; nothing has been changed or written.
    """
    given: TokenIds | None = None
    if isinstance(calibration, str):
        recipe = recipe.changed(calibration=calibration)
    elif calibration is not None:
        given = calibration if isinstance(calibration, TokenIds) else TokenIds(calibration)
    check_shared(recipe, given, machine.ranks)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    if isinstance(model_or_path, str | Path):
        original = open_original(
            model_or_path,
            recipe,
            machine.dtype,
            offload=not in_memory and not needs_model(recipe),
            keeps=in_memory or needs_blocks(recipe),
            processor=processor,
            trust_remote_code=trust_remote_code,
        )
    else:
        original = Original.in_memory(model_or_path, recipe, processor)
    check_format(original, recipe)
    samples = take_samples(original, recipe, given)
    check_tokens(original, samples)
    resolved = resolve(recipe, original, machine, samples=samples, given=given)
    check_passes(original, resolved)
    return PreparedRun(original, recipe, resolved, samples, machine)


def check_shared(recipe: Recipe, given: TokenIds | None, ranks: Ranks) -> None:
    """Raise unless the samples can be divided over `ranks`.

    Raises:
        UsageError: it names a batch size or number of samples that can.
    """
    check_batch(recipe.batch_size, recipe.nsamples if given is None else len(given.rows), ranks, recipe.learns)


def take_samples(original: Original, recipe: Recipe, given: TokenIds | None) -> Sequence[dict[str, Any]]:
    """Keyword arguments of one call per sample.

    Raises:
        UsageError: the source does not fit the model or is too small, or there is nothing that prepares its inputs.
    """
    if given is not None:
        return text_samples(given.rows)
    if original.processor is None:
        raise UsageError("a model in memory needs its tokenizer or processor, or token ids as calibration")
    config = original.model.config.get_text_config()
    return samples_of(original.modality, original.processor, recipe, window=lambda seqlen: window(config, seqlen))


def check_tokens(original: Original, samples: Sequence[dict[str, Any]]) -> None:
    """Raise unless the model's embedding has a row for every token of `samples`.

    Raises:
        UsageError: the tokenizer is another model's.
    """
    embedding = original.model.get_input_embeddings() if original.modality == "text" else None
    if isinstance(embedding, nn.Embedding):
        for sample in samples:
            check_vocabulary(sample["input_ids"], embedding.num_embeddings)


def check_format(original: Original, recipe: Recipe) -> None:
    """Raise unless most of the model's blocks can be quantized, and stored in the recipe's format.

    Raises:
        UsageError: it names the module and the remedy.
    """
    check_choice(original.model, linears_by_path(original), recipe)
    coverage = covered(original, recipe)
    if coverage is not None:
        coverage.check()
    check_group_size(linears_by_path(original), recipe.scheme)
    check_layout(original.model, [place.path for place in original.places], recipe.stored_scheme)


def check_result(prepared: PreparedRun) -> dict[str, int]:
    """Raise unless plain transformers will load what the run is about to make; returns its blocks' bytes, by path.

    Nothing is computed for that. Where mixed precision finds the bits, they are not known yet.

    Raises:
        UsageError: it will not.
    """
    original, recipe = prepared.original, prepared.recipe
    paths = [place.path for place in original.places]
    return rehearse(original.model, recipe, original.storage_dtype, paths=paths, name=original.name)


def linears_by_path(original: Original) -> dict[str, nn.Linear]:
    """Every linear of every block by its full name: what is quantized unless the recipe leaves it."""
    found: dict[str, Any] = {}
    for place in original.places:
        block = original.model.get_submodule(place.path)
        found |= {f"{place.path}.{name}": linear for name, linear in linears_of(block).items()}
    return found


def covered(original: Original, recipe: Recipe) -> Coverage | None:
    """Which share of the model `recipe` quantizes; None: it leaves weights alone."""
    if recipe.scheme.weights is None:
        return None
    linears = linears_by_path(original)
    quantized = recipe.scheme.chosen(linears)
    names = [*quantized, *chosen_modules(original.model, recipe)]
    return coverage_of(
        original.model,
        [place.path for place in original.places],
        {f"{name}.weight" for name in names},
        ignored=lambda module: module in linears and module not in quantized,
    )
