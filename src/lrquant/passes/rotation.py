"""Rotations, folded into a model's weights before learning; the function does not change.

With hidden states as rows, h R takes the place of h between blocks, and v Q that of a head's values:

| rotated | writes | reads |
|---|---|---|
| stream | embeddings E R; outputs Rᵀ W, Rᵀ b | behind a norm with weight γ: W diag(γ) R, and the norm's weight is one |
| values | rows of a head of v: Qᵀ W, Qᵀ b | the columns of out that read them: W Q |
| down | at run time: x H (`lrquant.transforms.online`) | W H |

An RMSNorm without weights commutes with every R; a LayerNorm, which subtracts the mean, with those that leave
the direction of ones where it is (`keeping_mean`). A LayerNorm's bias β goes into the readers' biases, W β, or,
where they have none, stays as Rᵀ(β/γ). Tied embeddings are untied: head and embedding then differ. (QuaRot §4,
SpinQuant §3; there LayerNorm models are left out.) Everything is computed in float64 and rounded once.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrquant.architectures import ResidualStream, Stage
from lrquant.architectures.targets import linears_of
from lrquant.errors import UsageError
from lrquant.loading.block_source import BlockSource
from lrquant.loading.original import Original
from lrquant.passes.definition import Pass
from lrquant.recipe import Recipe
from lrquant.reconstruction.result import Rotated
from lrquant.reconstruction.run import Run
from lrquant.transforms import NormToLinears, ValueToOutput
from lrquant.transforms.hadamard import hadamard, orthogonal_matrix
from lrquant.transforms.online import BlockHadamard, add_online_transform

MOST_ROWS = 16384


def resolve_rotation(original: Original, recipe: Recipe) -> dict[str, Any]:
    """Resolve `auto`: `stream` and `values` if they do not make the checkpoint larger, otherwise nothing.

    Rotating only values does not help (docs/benchmarks.md).
    """
    if "auto" not in recipe.rotate:
        return {}
    free = ("stream", "values") if any(_is_free(original.model, stage) for stage in original.stages) else ()
    named = (part for part in recipe.rotate if part != "auto")
    return {"rotate": tuple(dict.fromkeys([*free, *named]))}


def _is_free(model: Any, stage: Stage) -> bool:
    """Whether the hidden states of `stage` can be rotated without a parameter more."""
    if not _allows(stage, "stream"):
        return False
    try:
        head = check_stream(model, stage)
    except UsageError:
        return False
    above = model.get_submodule(stage.path.rpartition(".")[0])
    plain_norm = getattr(above.get_submodule(_residual(stage).norm), "bias", None) is None
    return plain_norm and f"{head}.weight" not in (getattr(model, "all_tied_weights_keys", None) or {})


def check_rotation(original: Original, recipe: Recipe) -> None:
    """Raise where the model has something that the recipe's rotations cannot be folded into.

    Raises:
        UsageError: it names the part and the reason.
    """
    for part in recipe.rotate:
        if not any(_allows(stage, part) for stage in original.stages):
            reasons = [stage.residual.why_not for stage in original.stages if stage.residual and stage.residual.why_not]
            raise UsageError(
                f"rotate {part!r}: {original.model.config.model_type} models do not support it"
                f"{f' ({reasons[0]})' if reasons and part == 'stream' else ''}; leave it out"
            )
    for stage in original.stages:
        if "stream" in recipe.rotate and _allows(stage, "stream"):
            check_stream(original.model, stage)


@torch.no_grad()
def rotate(original: Original, recipe: Recipe) -> Rotated:
    """Rotate the model as `recipe.rotate` says: now, or block by block as its source reads them.

    What stands outside the blocks is rounded to the checkpoint's type, so that learning sees what it will hold.

    Raises:
        UsageError: the model has something that a rotation cannot be folded into.
    """
    check_rotation(original, recipe)
    model, block_source = original.model, original.block_source
    sizes, online, untied, place = [], [], 0, 0
    for stage in original.stages:
        if "stream" in recipe.rotate and _allows(stage, "stream"):
            matrix = stream_matrix(model, stage, recipe)
            untied = rotate_stream(original, stage, matrix)
            sizes.append(len(matrix))
        for index, block in enumerate(stage.blocks(model)):
            path = f"{stage.path}.{index}"
            if "values" in recipe.rotate:
                sizes += [pair.value_rows.shape[-1] for pair in _pairs(stage)]
                block_source.alter(
                    path, partial(_rotate_all_values, pairs=_pairs(stage), recipe=recipe, seed=recipe.seed + 1 + place)
                )
            if "down" in recipe.rotate and _turns_down(stage, path, recipe):
                assert stage.residual is not None
                linear: nn.Linear = block.get_submodule(stage.residual.down)  # type: ignore[assignment]
                add_online_transform(linear)
                block_source.alter(path, partial(_transform_down, stage.residual.down))
                online.append(f"{path}.{stage.residual.down}")
            place += 1
    unknown = [size for size in dict.fromkeys(sizes) if recipe.rotate_by == "hadamard" and hadamard(size) is None]
    notes = [
        f"No Hadamard matrix of order {size} is known here: a random rotation is used instead." for size in unknown
    ]
    return Rotated(tuple(online), untied, notes)


def _turns_down(stage: Stage, path: str, recipe: Recipe) -> bool:
    """Whether the down projection of the block at `path` is known, and quantized."""
    return stage.residual is not None and not recipe.scheme.within(path).leaves(stage.residual.down)


def _allows(stage: Stage, part: str) -> bool:
    if part == "values":
        return any(isinstance(equivalence, ValueToOutput) for equivalence in stage.equivalences)
    return stage.residual is not None and not (part == "stream" and stage.residual.why_not)


def check_stream(model: Any, stage: Stage) -> str:
    """The path of the head that reads the hidden states of `stage`.

    Raises:
        UsageError: something reads or writes them that a rotation cannot be folded into.
    """
    residual = _residual(stage)
    readers = {linear for norm in _norms(stage) for linear in norm.linears}
    for index, block in enumerate(stage.blocks(model)):
        linears = set(linears_of(block))
        odd = sorted(linears ^ (readers | set(residual.writers)))
        if odd:
            raise UsageError(
                f"rotate 'stream': {stage.path}.{index}.{odd[0]} neither reads the residual stream after a norm "
                f"nor writes to it; leave it out"
            )
    above, head = model.get_submodule(stage.path.rpartition(".")[0]), model.get_output_embeddings()
    if head is None or getattr(above, residual.norm, None) is None:
        raise UsageError("rotate 'stream': a model without a language head would return rotated hidden states")
    if getattr(above, "project_in", None) is not None:
        raise UsageError("rotate 'stream': embeddings with another width than the blocks cannot be rotated")
    return next(name for name, module in model.named_modules() if module is head)


def _norms(stage: Stage) -> list[NormToLinears]:
    return [equivalence for equivalence in stage.equivalences if isinstance(equivalence, NormToLinears)]


def _pairs(stage: Stage) -> list[ValueToOutput]:
    return [equivalence for equivalence in stage.equivalences if isinstance(equivalence, ValueToOutput)]


def stream_matrix(model: Any, stage: Stage, recipe: Recipe) -> Tensor:
    """R for the hidden states of `stage`, (hidden, hidden), float64."""
    residual, above = _residual(stage), model.get_submodule(stage.path.rpartition(".")[0])
    width = above.get_submodule(residual.embeddings[0]).weight.shape[1]
    keep_mean = isinstance(getattr(above, residual.norm, None), nn.LayerNorm)
    return orthogonal_matrix(width, recipe.rotate_by, torch.Generator().manual_seed(recipe.seed), keep_mean)


def _residual(stage: Stage) -> ResidualStream:
    assert stage.residual is not None
    return stage.residual


@torch.no_grad()
def rotate_stream(original: Original, stage: Stage, matrix: Tensor) -> int:
    """Rotate the hidden states of `stage` by `matrix`; returns how many parameters untying the head added.

    Raises:
        UsageError: something reads or writes them that a rotation cannot be folded into.
    """
    model, block_source, storage_dtype = original.model, original.block_source, original.storage_dtype
    residual, norms, head_path = _residual(stage), _norms(stage), check_stream(model, stage)
    above = model.get_submodule(stage.path.rpartition(".")[0])
    untied = _untie(model, head_path, block_source)
    for name in residual.embeddings:
        _multiply(above.get_submodule(name).weight, matrix)  # type: ignore[arg-type]
        _round(above.get_submodule(name), storage_dtype)
    if stage.joins is not None:
        _rotate_outputs(model.get_submodule(stage.joins), matrix)
        _round(model.get_submodule(stage.joins), storage_dtype)
    for index in range(len(stage.blocks(model))):
        block_source.alter(
            f"{stage.path}.{index}", partial(_rotate_block, norms=norms, writers=residual.writers, matrix=matrix)
        )
    norm = above.get_submodule(residual.norm)
    gain, bias = _norm_values(norm, norms[0].offset)
    stays = _fold_norm(norm, norms[0].offset, [], matrix=matrix, name=residual.norm)
    _round(norm, storage_dtype)

    def rotate_head(module: nn.Module) -> None:
        _read_rotated(module, gain, None if stays else bias, matrix=matrix)
        _round(module, storage_dtype)

    block_source.alter(head_path, rotate_head)
    return untied


@torch.no_grad()
def _rotate_block(block: nn.Module, *, norms: Sequence[NormToLinears], writers: Sequence[str], matrix: Tensor) -> None:
    for norm in norms:
        linears = [block.get_submodule(name) for name in norm.linears]
        _fold_norm(block.get_submodule(norm.norm), norm.offset, linears, matrix=matrix, name=norm.norm)
    for name in writers:
        _rotate_outputs(block.get_submodule(name), matrix)


@torch.no_grad()
def _rotate_all_values(block: nn.Module, *, pairs: Sequence[ValueToOutput], recipe: Recipe, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for pair in pairs:
        turn = orthogonal_matrix(pair.value_rows.shape[-1], recipe.rotate_by, generator)
        _rotate_values(block, pair, turn)


@torch.no_grad()
def _transform_down(name: str, block: nn.Module) -> None:
    weight: Tensor = block.get_submodule(name).weight  # type: ignore[assignment]
    weight.copy_(BlockHadamard(weight.shape[1])(weight.double()))


@torch.no_grad()
def _round(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.copy_(parameter.to(dtype))


def _untie(model: Any, head_path: str, block_source: BlockSource) -> int:
    """Give the head weights of its own, where they are the embedding's; returns their number."""
    name = f"{head_path}.weight"
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if name not in tied:
        return 0
    block_source.untie(name, tied.pop(name))
    model.all_tied_weights_keys = tied
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    return int(model.get_parameter(name).numel())


def _norm_values(norm: nn.Module, offset: float) -> tuple[Tensor, Tensor | None]:
    """(what the norm multiplies by, what it adds), copies in float64."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(norm, "bias", None)
    return weight.double() + offset, None if bias is None else bias.double().clone()


def _fold_norm(norm: nn.Module, offset: float, readers: Sequence[nn.Module], *, matrix: Tensor, name: str) -> bool:
    """Move a norm's weight, and its bias if it can, into `readers`, and rotate these; whether the bias stays.

    Raises:
        UsageError: a bias has to stay where the weight is zero.
    """
    gain, bias = _norm_values(norm, offset)
    stays = bias is not None and (not readers or any(reader.bias is None for reader in readers))
    norm.weight.fill_(1 - offset)  # type: ignore[operator]
    if bias is not None:
        if stays and bool(((gain == 0) & (bias != 0)).any()):
            raise UsageError(f"rotate 'stream': the norm {name} has a bias where its weight is zero; leave it out")
        rotated = torch.where(gain == 0, 0.0, bias / gain) @ matrix
        norm.bias.copy_(rotated if stays else torch.zeros_like(rotated))  # type: ignore[operator]
    for reader in readers:
        _read_rotated(reader, gain, None if stays else bias, matrix=matrix)
    return stays


@torch.no_grad()
def _read_rotated(linear: nn.Module, gain: Tensor, bias: Tensor | None, *, matrix: Tensor) -> None:
    """W ← W diag(γ) R and b ← b + W β."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    if bias is not None:
        linear.bias.copy_(linear.bias.double() + weight.double() @ bias)  # type: ignore[operator]
    _multiply(weight, matrix, gain)


def _multiply(weight: Tensor, matrix: Tensor, gain: Tensor | None = None) -> None:
    """W ← W diag(γ) R, some rows at a time: a vocabulary's in float64 would be large."""
    for rows in weight.split(MOST_ROWS):
        rows.copy_((rows.double() if gain is None else rows.double() * gain) @ matrix)


def _rotate_outputs(linear: nn.Module, matrix: Tensor) -> None:
    """W ← Rᵀ W and b ← Rᵀ b."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    weight.copy_(matrix.T @ weight.double())
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.double() @ matrix)  # type: ignore[operator]


def _rotate_values(block: nn.Module, pair: ValueToOutput, turn: Tensor) -> None:
    """Rotate every head's values by `turn`, (head_dim, head_dim)."""
    value, output = block.get_submodule(pair.value), block.get_submodule(pair.output)
    rows, columns = pair.value_rows.flatten(), pair.output_columns.flatten()
    weight: Tensor = value.weight  # type: ignore[assignment]
    heads = weight[rows].double().unflatten(0, (-1, len(turn)))  # (kv_heads, head_dim, in)
    weight[rows] = (turn.T @ heads).flatten(0, 1).to(weight.dtype)
    if value.bias is not None:
        bias: Tensor = value.bias  # type: ignore[assignment]
        bias[rows] = (bias[rows].double().unflatten(0, (-1, len(turn))) @ turn).flatten().to(bias.dtype)
    weight = output.weight  # type: ignore[assignment]
    weight[:, columns] = (weight[:, columns].double().unflatten(1, (-1, len(turn))) @ turn).flatten(1).to(weight.dtype)


def _carry_out(run: Run) -> None:
    run.result.rotated = rotate(run.original, run.recipe)


ROTATION = Pass(
    "rotation",
    _carry_out,
    applies=lambda recipe: bool(recipe.rotate),
    resolve=resolve_rotation,
    check=check_rotation,
)
