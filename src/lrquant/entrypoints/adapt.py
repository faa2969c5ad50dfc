"""Test-time adaptation: fit a quantized model to an unlabelled test set that it was not calibrated on.

The test samples pass through both streams, block by block: the activations of the original, and those of the quantized
blocks. The learnables of the chosen blocks (by default the last one) are learned again, starting from the *original's*
weights and neutral values, S = 1 and δ = 0, so that the two streams agree (LRQuant, test-time adaptation). Only the
tokens of the test samples are used.

The result is a new checkpoint: the tensors of the chosen blocks are replaced, every other byte is copied. The quantized
checkpoint that it started from is unchanged. A block that does not improve keeps the checkpoint's parameters.
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

from lrquant.architectures.targets import expose_linears
from lrquant.calibration.samples import TokenIds
from lrquant.calibration.text import Bos, evaluation_ids, leading_token, windows
from lrquant.entrypoints.preparation import pick_machine, prepare
from lrquant.entrypoints.results import Adapted
from lrquant.errors import LrquantError, UsageError
from lrquant.export import check_save_dir
from lrquant.export.compressed_tensors import STATIC_SCALES
from lrquant.export.expert_layout import in_own_layout, stored_names
from lrquant.export.packing import Packer
from lrquant.export.saving import as_stored_before, whole_directory
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
from lrquant.runtime.paths import public_name

ADAPTATION_FILE = "adaptation.yaml"
MOST_SAMPLES = 128

_CARD = """
## Adaptation

Block{plural} {blocks} of this checkpoint {were} adapted to `{data}` ({nsamples} unlabelled samples of {seqlen} tokens,
{epochs} epochs), with `{reference}` as the reference; `{file}` has the details. Everything else is unchanged.
"""


class AdaptOptions(TypedDict, total=False):
    """How the chosen blocks are learned again.

    epochs: epochs over the test samples per block; 5.
    init: initial smoothing scales: `neutral`, or `log` or `smoothquant` from the test set's statistics.
    nsamples: the largest number of windows, spread evenly over the text; 128.
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
        quantized: a folder that lrquant wrote; it is not changed.
        reference: the full-precision model that it was made from.
        data: a text by name or path, whose evaluation part is used, or token ids, (1, tokens) each.
        blocks: `last`, `all`, or indices such as `0,4,5` (from the end: -1).
        callback: is called as the run progresses (`lrquant.reconstruction.callbacks`).
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
    given = _test_samples(source, reference, data, recipe=recipe, options=options)
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
        raise UsageError(f"{source}: method {recipe.method} learns nothing, so there is nothing to adapt")
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
        window=1,
        window_overlap=0,
        products="auto",
        kernels="auto",
    )


def _test_samples(
    source: Path,
    reference: str | Path,
    data: str | Sequence[Tensor],
    *,
    recipe: Recipe,
    options: AdaptOptions,
) -> TokenIds:
    """The test set's windows."""
    if not isinstance(data, str):
        return TokenIds(list(data))
    trust = options.get("trust_remote_code", False)
    config = load_config(str(reference), trust).get_text_config()
    length = window(config, options.get("seqlen") or recipe.seqlen)
    tokenizer = load_tokenizer(str(source), trust)
    most = options.get("nsamples") or MOST_SAMPLES
    return TokenIds(adaptation_samples(tokenizer, data, length, most=most, bos=recipe.bos), data)


def _present(loaded: Any, original: Original, blocks: str) -> Present:
    """The checkpoint's blocks as they are, those of `blocks` to be learned again."""
    paths = [f"{stage.path}.{index}" for stage in original.stages for index in range(len(stage.blocks(original.model)))]
    expose_linears(loaded)
    present = block_parameters(loaded, original.model, paths)
    static_scales = [static_scales_of(loaded.get_submodule(path)) for path in paths]
    return Present(present, frozenset(parse_blocks(blocks, len(present))), static_scales)


def _write(source: Path, adapted: Adapted, result: Reconstruction, *, original: Original) -> None:
    """Write the checkpoint `source` with the improved blocks, and the record of what was done."""
    scheme, paths = result.recipe.stored_scheme, result.block_paths
    better = [record.index for record in result.records if record.outcome != "kept present"]
    packer = Packer(original.model, scheme, original.storage_dtype)
    tensors: dict[str, Tensor] = {}
    for index, frozen in zip(better, result.frozen, strict=True):
        tensors |= packer.block(paths[index], frozen, buffers={})
    names = stored_names(original.model, in_own_layout(original.model, result))
    tensors = as_stored_before(original.model, tensors, names)
    facts = {
        "quantized": public_name(str(source)),
        "reference": public_name(original.name),
        "blocks": list(adapted.blocks),
        "replaced": better,
        "recipe": result.recipe.model_dump() | {"calibration": public_name(result.recipe.calibration)},
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


def adaptation_samples(tokenizer: Any, data: str, seqlen: int, *, most: int, bos: Bos = "off") -> list[Tensor]:
    """Windows of the evaluation text, (1, seqlen) each, as perplexity cuts them; at most `most`, spread evenly."""
    ids = evaluation_ids(tokenizer, data, bos)
    rows = windows(ids, seqlen, leading_token(tokenizer, bos)).unsqueeze(1)
    if len(rows) == 0:
        raise UsageError(f"{data}: {len(ids)} tokens are fewer than one window of {seqlen}")
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

    The report is not copied, because it describes another run.
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
                        raise LrquantError(f"{source}: {name} has a layout that this version of lrquant does not know")
                    content[name] = new.contiguous()
                save_file(content, copy, metadata)
                continue
        shutil.copyfile(path, copy)
    if left:
        raise LrquantError(f"{source}: the checkpoint has no {next(iter(left))}; its layout is not one of lrquant's")


def _extend_card(card: Path, recipe: Recipe, chosen: Sequence[int], *, reference: str) -> None:
    plural, were = ("s", "were") if len(chosen) > 1 else ("", "was")
    text = _CARD.format(
        plural=plural,
        were=were,
        blocks=", ".join(map(str, chosen)),
        data=public_name(recipe.calibration),
        nsamples=recipe.nsamples,
        seqlen=recipe.seqlen,
        epochs=recipe.epochs,
        reference=public_name(reference),
        file=ADAPTATION_FILE,
    )
    card.write_text((card.read_text() if card.is_file() else "") + text)
