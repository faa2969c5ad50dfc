"""Test-time adaptation: fit a quantized model to an unlabelled test set that it was not calibrated on.

The test samples pass through both streams, block by block: the original's own activations, and those of the
quantized blocks. Where a block is chosen (the last one, unless asked otherwise) its learnables are learned
again from the *original's* weights and a neutral start, S = 1 and δ = 0, so that the two streams meet (LRQuant,
test-time adaptation). Nothing of a test sample but its tokens is used.

The result is a new checkpoint beside the old one: the chosen blocks' tensors are replaced, every other byte is
copied. Going back to the original is loading the original. A block that would answer worse than the
checkpoint's keeps the checkpoint's.
"""

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lrquant.calibration.samples import TokenIds
from lrquant.calibration.text import evaluation_ids
from lrquant.entrypoints.preparation import pick_machine, prepare
from lrquant.entrypoints.results import Adapted
from lrquant.errors import LrquantError, UsageError
from lrquant.export import check_save_dir
from lrquant.export.compressed_tensors import STATIC_SCALES, needs_whole_weights, pack_block
from lrquant.export.saving import whole_directory
from lrquant.formats.activation_quant import cache_scales_of
from lrquant.loading.checkpoint import load, saved_recipe
from lrquant.loading.original import Original
from lrquant.loading.pretrained import load_config, load_tokenizer, stored_dtype, window
from lrquant.passes.adaptation import Present
from lrquant.passes.pipeline import BLOCKS, carry_out
from lrquant.passes.rotation import ROTATION
from lrquant.recipe import Recipe
from lrquant.reconstruction.callbacks import Callback
from lrquant.reconstruction.result import Reconstruction
from lrquant.report.run import FOLDER, PAGE
from lrquant.runtime.files import write_sums

ADAPTATION_FILE = "adaptation.yaml"
MOST_SAMPLES = 128

_CARD = """
## Adaptation

Block{plural} {blocks} of this checkpoint {were} adapted to `{data}` ({nsamples} unlabelled samples of {seqlen} tokens,
{epochs} epochs), with `{reference}` as the reference; `{file}` has the details. Everything else is as it was.
"""


class AdaptOptions(TypedDict, total=False):
    """How the chosen blocks are learned again.

    epochs: passes over the test samples per block; 5.
    init: where smoothing starts: `neutral`, or `log` or `smoothquant` from the test set's statistics.
    nsamples: at most so many windows, spread evenly over the text; 128.
    seqlen: tokens per window; None: as the checkpoint was calibrated.
    device: `auto` (an accelerator if there is one), `cpu`, `cuda:1`, …
    trust_remote_code: whether code that comes with the model may run; False unless given.
    """

    epochs: int
    init: str
    nsamples: int | None
    seqlen: int | None
    device: str
    trust_remote_code: bool


def adapt(
    quantized: str | Path,
    reference: str | Path,
    data: str | Sequence[Tensor],
    *,
    save_dir: str | Path,
    blocks: str = "last",
    callback: Callback | None = None,
    **options: Unpack[AdaptOptions],
) -> Adapted:
    """Adapt the checkpoint `quantized` to `data` and write the result to `save_dir`.

    >>> lrquant.adapt("llama-w4a4", "zoo:llama", "zoo:pydoc", save_dir="llama-w4a4-pydoc")

    Args:
        quantized: a folder that lrquant wrote; it is only read.
        reference: the full-precision model that it was made from.
        data: a text by name or path, whose evaluation part is used, or token ids, (1, tokens) each.
        blocks: `last`, `all`, or indices such as `0,4,5` (from the end: -1).
        callback: hears of progress (`lrquant.reconstruction.callbacks`).
        options: `AdaptOptions`.

    Raises:
        UsageError, LrquantError: one line each; nothing is left behind.
    """
    began = time.perf_counter()
    unknown = options.keys() - AdaptOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown argument {min(unknown)!r}: there are {', '.join(AdaptOptions.__annotations__)}")
    target, source, trust = check_save_dir(save_dir), Path(quantized), options.get("trust_remote_code", False)
    recipe = _adaptable_recipe(source)
    machine = pick_machine(recipe, options.get("device", "auto"), shared=False)
    given = _test_samples(source, reference, data, seqlen=recipe.seqlen, options=options)
    prepared = prepare(
        reference, _learning(recipe, given, options), machine, calibration=given, trust_remote_code=trust
    )
    original = replace(prepared.original, storage_dtype=stored_dtype(str(source), trust))
    prepared = replace(prepared, original=original)
    present = _present(load(str(source), machine.dtype, trust), original, blocks)
    cache = prepared.cache("host", Path(tempfile.gettempdir()))
    run = prepared.run(cache, callback=callback or Callback(), providers=present.providers())
    result = carry_out(run, [ROTATION, BLOCKS] if ROTATION.applies(run.recipe) else [BLOCKS])
    adapted = Adapted(target, result.recipe, tuple(sorted(present.relearned)), result.records, 0.0)
    _write(source, adapted, result, original=original)
    adapted.seconds = time.perf_counter() - began
    return adapted


def _adaptable_recipe(source: Path) -> Recipe:
    """The recipe of the checkpoint `source`.

    Raises:
        UsageError: lrquant did not write it, or it has nothing to learn.
    """
    recipe = saved_recipe(str(source)) if source.is_dir() else None
    if recipe is None:
        raise UsageError(f"{source}: not a checkpoint that lrquant wrote (a folder with recipe.yaml)")
    if not (recipe.let or recipe.lwc or recipe.rotation_vectors):
        raise UsageError(f"{source}: method {recipe.method} has nothing to learn, so nothing to adapt")
    return recipe


def _learning(recipe: Recipe, given: TokenIds, options: AdaptOptions) -> Recipe:
    """The checkpoint's recipe as its blocks are learned again, on this machine."""
    return recipe.changed(
        seqlen=given.rows[0].shape[1],
        epochs=options.get("epochs", 5),
        init=options.get("init", "neutral"),
        loss="mse+nlc",
        two_branch=False,
        dynamic_loss=False,
        tuning_epochs=0,
        products="auto",
        kernels="auto",
    )


def _test_samples(
    source: Path,
    reference: str | Path,
    data: str | Sequence[Tensor],
    *,
    seqlen: int | None,
    options: AdaptOptions,
) -> TokenIds:
    """The test set's windows."""
    if not isinstance(data, str):
        return TokenIds(list(data))
    trust = options.get("trust_remote_code", False)
    config = load_config(str(reference), trust).get_text_config()
    length = window(config, options.get("seqlen") or seqlen)
    tokenizer = load_tokenizer(str(source), trust)
    return TokenIds(adaptation_samples(tokenizer, data, length, most=options.get("nsamples") or MOST_SAMPLES), data)


def _present(loaded: Any, original: Original, blocks: str) -> Present:
    """The checkpoint's blocks as they are, those of `blocks` to be learned again."""
    paths = [f"{stage.path}.{index}" for stage in original.stages for index in range(len(stage.blocks(original.model)))]
    present = block_parameters(loaded, original.model, paths)
    static_scales = [static_scales_of(loaded.get_submodule(path)) for path in paths]
    return Present(present, frozenset(parse_blocks(blocks, len(present))), static_scales)


def _write(source: Path, adapted: Adapted, result: Reconstruction, *, original: Original) -> None:
    """The checkpoint `source` with the blocks that answer better, beside what was done."""
    scheme, paths = result.recipe.stored_scheme, result.block_paths
    better = [record.index for record in result.records if record.outcome != "kept present"]
    tensors = {
        f"{paths[index]}.{name}": tensor
        for index, frozen in zip(better, result.frozen, strict=True)
        for name, tensor in pack_block(
            frozen,
            scheme.within(paths[index]),
            original.storage_dtype,
            needs_whole_weights(original.model, paths[index]),
        ).items()
    }
    facts = {
        "quantized": str(source),
        "reference": original.name,
        "blocks": list(adapted.blocks),
        "replaced": better,
        "recipe": result.recipe.model_dump(),
    }
    with whole_directory(adapted.saved_to) as folder:
        copy_with_replacements(source, folder, tensors)
        write_sums(folder)
        (folder / ADAPTATION_FILE).write_text(yaml.safe_dump(facts, sort_keys=False))
        _extend_card(folder / "README.md", result.recipe, adapted.blocks, reference=original.name)


def parse_blocks(wanted: str, count: int) -> tuple[int, ...]:
    """Indices of `last`, `all` or a list such as `0,4,-1`, among `count` blocks."""
    if wanted in ("last", "all"):
        return tuple(range(count)) if wanted == "all" else (count - 1,)
    try:
        indices = [int(part) for part in wanted.split(",")]
    except ValueError:
        raise UsageError(f"blocks {wanted!r}: give last, all, or indices such as 0,4,5") from None
    if any(not -count <= index < count for index in indices):
        raise UsageError(f"blocks {wanted!r}: the model has blocks 0 to {count - 1}")
    return tuple(sorted({index % count for index in indices}))


def adaptation_samples(tokenizer: Any, data: str, seqlen: int, *, most: int) -> list[Tensor]:
    """Windows of the evaluation text, (1, seqlen) each, as perplexity cuts them; at most `most`, spread evenly."""
    ids = evaluation_ids(tokenizer, data)
    rows = ids[: len(ids) // seqlen * seqlen].view(-1, 1, seqlen)
    if len(rows) == 0:
        raise UsageError(f"{data}: {len(ids)} tokens are less than one window of {seqlen}")
    return list(rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).round().long()])


def block_parameters(model: nn.Module, original: nn.Module, paths: Sequence[str]) -> list[Mapping[str, Tensor]]:
    """Each block's dequantized parameters under the names that `original`'s block gives them, and added biases.

    Raises:
        UsageError: `original` is not what `model` was made from.
    """
    try:
        pairs = [(model.get_submodule(path), original.get_submodule(path)) for path in paths]
        result: list[Mapping[str, Tensor]] = []
        for ours, theirs in pairs:
            state, shapes = ours.state_dict(), {name: value.shape for name, value in theirs.named_parameters()}
            extra = [name for name in state if name.endswith(".bias")]
            result.append({name: state[name] for name in dict.fromkeys([*shapes, *extra])})
            if any(result[-1][name].shape != shape for name, shape in shapes.items()):
                raise ValueError
    except (AttributeError, ValueError, KeyError):
        raise UsageError(
            "the reference is not the model that this checkpoint was made from: their blocks differ"
        ) from None
    return result


def static_scales_of(block: nn.Module) -> dict[str, Tensor]:
    """The calibrated scales of a loaded block, by name."""
    inputs = {name: value for name, value in block.state_dict().items() if name.endswith(STATIC_SCALES)}
    return inputs | cache_scales_of(block)


def copy_with_replacements(source: Path, target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy the files of a checkpoint; tensors named in `tensors` are replaced, all else stays byte for byte.

    The report is left behind: it tells of another run.
    """
    left = dict(tensors)
    for path in sorted(source.rglob("*")):
        if path.relative_to(source).parts[0] in (PAGE, FOLDER):
            continue
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir()
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                replaced = [name for name in file.keys() if name in left]  # noqa: SIM118
                metadata = file.metadata()
            if replaced:
                content = load_file(path)
                for name in replaced:
                    new = left.pop(name)
                    if new.shape != content[name].shape or new.dtype != content[name].dtype:
                        raise LrquantError(f"{source}: {name} is not laid out as this lrquant lays it out")
                    content[name] = new.contiguous()
                save_file(content, copy, metadata)
                continue
        shutil.copyfile(path, copy)
    if left:
        raise LrquantError(f"{source}: the checkpoint has no {next(iter(left))}; it is not laid out as lrquant does")


def _extend_card(card: Path, recipe: Recipe, chosen: Sequence[int], *, reference: str) -> None:
    plural, were = ("s", "were") if len(chosen) > 1 else ("", "was")
    text = _CARD.format(
        plural=plural,
        were=were,
        blocks=", ".join(map(str, chosen)),
        data=recipe.calibration,
        nsamples=recipe.nsamples,
        seqlen=recipe.seqlen,
        epochs=recipe.epochs,
        reference=reference,
        file=ADAPTATION_FILE,
    )
    card.write_text((card.read_text() if card.is_file() else "") + text)
