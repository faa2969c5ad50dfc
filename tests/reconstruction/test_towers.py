"""Every vision and multimodal family goes through the engine, to disk and back, bit for bit."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lrquant.architectures import family_of
from lrquant.calibration.capture import capture
from lrquant.entrypoints.preparation import PreparedRun
from lrquant.entrypoints.resolve import resolve
from lrquant.entrypoints.results import keep_activations_quantized
from lrquant.errors import UsageError
from lrquant.export.packing import Packer
from lrquant.export.saving import About, sizes_in_memory, write_checkpoint
from lrquant.loading.auto_class import auto_model, modality_of
from lrquant.loading.checkpoint import load
from lrquant.loading.original import Original
from lrquant.passes.pipeline import carry_out
from lrquant.recipe import Recipe
from lrquant.reconstruction.callbacks import Callback
from lrquant.reconstruction.result import Reconstruction
from lrquant.runtime.execution import Machine
from tests.vision_models import MODELS, MULTIMODAL, build, inputs_of, output_of


def quantized(name: str, callback: Callback | None = None, **changes: Any) -> tuple[Any, Reconstruction, Recipe]:
    model = build(name, torch.float32)
    towers = changes.pop("towers", family_of(model).towers)
    recipe = Recipe.preset(changes.pop("method", "lrquant"), nsamples=3, towers=towers, **changes)
    if recipe.epochs:
        recipe = recipe.changed(epochs=1)
    samples = inputs_of(name, 3, dtype=torch.float32)
    original, machine = Original.in_memory(model, recipe), Machine(torch.device("cpu"))
    recipe = resolve(recipe, original, machine, samples=samples, given=None)
    prepared = PreparedRun(original, recipe, recipe, samples, machine)
    result = carry_out(prepared.run(prepared.cache("host"), callback=callback or Callback()))
    keep_activations_quantized(model, recipe, result)
    return model, result, recipe


def save(folder: Path, model: Any, result: Reconstruction, recipe: Recipe) -> None:
    folder.mkdir()
    sizes = sizes_in_memory(model, result, torch.float32)
    packer = Packer(model, recipe.stored_scheme, torch.float32)
    groups = itertools.chain(packer.outside(result), packer.blocks(result))
    about, dtype = About("original"), torch.float32
    write_checkpoint(folder, model, result, groups=groups, storage_dtype=dtype, about=about, sizes_of=lambda _: sizes)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_answer_as_the_model_in_memory(name: str, tmp_path: Path) -> None:
    model, result, recipe = quantized(name, wbits=4, abits=4)
    assert len(result.frozen) == 4 if name in MULTIMODAL or name.startswith("swin") else 2
    save(tmp_path / "saved", model, result, recipe)
    loaded = load(str(tmp_path / "saved"))
    assert type(loaded) is type(model)
    assert auto_model(loaded.config) is auto_model(model.config)
    assert modality_of(loaded) == modality_of(model)
    (inputs,) = inputs_of(name, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(output_of(loaded, inputs), output_of(model, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["clip", "siglip-alone", "llava", "gemma3"])
@pytest.mark.parametrize(
    "changes",
    [{"abits": 4}, {"abits": 16, "symmetric": True}, {"abits": 16}, {"numbers": "fp8", "wbits": 8, "abits": 8}],
    ids=str,
)
def test_towers_whose_code_fills_weights_unseen_load_without_lrquant(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """CLIP's and SigLIP's initialisation stumbles over packed weights; theirs are whole where they would be packed."""
    method = {"method": "rtn", "wbits": 4, "quantize_attention": False}  # the file holds no scheme for attention
    model, result, recipe = quantized(name, **method | changes)
    save(tmp_path / "saved", model, result, recipe)
    plain = auto_model(model.config).from_pretrained(tmp_path / "saved")
    (inputs,) = inputs_of(name, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(output_of(plain, inputs), output_of(model, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit", "swin", "llava", "qwen2.5-vl"])
@pytest.mark.parametrize("method", ["rtn", "smoothquant", "omniquant", "lrquant", "lrquant+"])
def test_every_method(name: str, method: str) -> None:
    model, result, _ = quantized(name, method=method, wbits=4, abits=4)
    with torch.no_grad():
        assert torch.isfinite(output_of(model, inputs_of(name, dtype=torch.float32)[0])).all()
    assert all(0 < record.cosine <= 1 for record in result.records)


@pytest.mark.parametrize("bits", [(6, 6), (4, 16), (2, 16)])
def test_every_format(bits: tuple[int, int], tmp_path: Path) -> None:
    model, result, recipe = quantized("deit", wbits=bits[0], abits=bits[1])
    save(tmp_path / "saved", model, result, recipe)
    loaded = load(str(tmp_path / "saved"))
    (inputs,) = inputs_of("deit", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(output_of(loaded, inputs), output_of(model, inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_language_alone_leaves_the_vision_tower_as_it_was(name: str) -> None:
    model, result, _ = quantized(name, wbits=4, abits=4, towers=None)
    original = build(name, torch.float32)
    vision, language = (stage.path for stage in family_of(model).stages(model, ("vision", "language")))
    assert all(path.startswith(language) for path in result.block_paths)
    for before, after in zip(
        original.get_submodule(vision).parameters(), model.get_submodule(vision).parameters(), strict=True
    ):
        assert torch.equal(before, after)


def test_the_second_tower_learns_from_what_the_quantized_first_produces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantized stream of the language tower starts as the model with its quantized vision tower says."""
    from lrquant.reconstruction import streams

    captured = []

    def remembering(*args: Any) -> Any:
        inputs = capture(*args)
        captured.append([hidden.clone() for hidden in inputs.hidden])  # the streams are overwritten as they advance
        return inputs

    monkeypatch.setattr(streams, "capture", remembering)
    model, _, _ = quantized("llava", method="rtn", wbits=4, abits=4, towers=("vision", "language"))
    _, full_precision, behind_quantized = captured
    language = family_of(model).stages(model)[0]
    now = capture(model, language.blocks(model), inputs_of("llava", 3, dtype=torch.float32))
    for one, other, end in zip(full_precision, behind_quantized, now.hidden, strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(other, end, rtol=0, atol=0)


def test_the_stage_behind_a_merging_starts_where_the_model_says() -> None:
    """Swin's second stage receives the merged patches: its full-precision stream is the model's own."""
    model = build("swin", torch.float32)
    (inputs,) = inputs_of("swin", dtype=torch.float32)
    second = family_of(model).stages(model)[1]
    seen = []
    handle = second.blocks(model)[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    (hidden,) = capture(model, second.blocks(model), [inputs]).hidden
    torch.testing.assert_close(hidden, seen[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "extra", "packed"),
    [
        ("vit", ("head", "patch_embedding"), {"classifier"}),
        ("deit-distilled", ("head",), {"cls_classifier", "distillation_classifier"}),
        ("llava", ("projector", "head"), {f"model.multi_modal_projector.linear_{n}" for n in (1, 2)} | {"lm_head"}),
        ("qwen2-vl", ("projector",), {f"model.visual.merger.mlp.{n}" for n in (0, 2)}),
    ],
)
def test_parts_outside_the_blocks_are_rounded_when_chosen(
    name: str, extra: Any, packed: set[str], tmp_path: Path
) -> None:
    model, result, recipe = quantized(name, method="rtn", wbits=4, abits=4, extra=extra)
    assert set(result.outside.weights) == packed
    if "patch_embedding" in extra:
        embedding = model.get_submodule("vit.embeddings.patch_embeddings.projection").weight
        assert all(len(row.unique()) <= 16 for row in embedding.flatten(1))  # four bits
    save(tmp_path / "saved", model, result, recipe)
    loaded = load(str(tmp_path / "saved"))
    (inputs,) = inputs_of(name, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(output_of(loaded, inputs), output_of(model, inputs), rtol=0, atol=0)


def test_a_part_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="projector"):
        quantized("vit", method="rtn", extra=("projector",))


def test_blocks_of_later_towers_have_numbers_of_their_own() -> None:
    """A block's number seeds its order of samples, and is what callbacks hear."""
    name = next(name for name in MODELS if name in MULTIMODAL)
    heard: list[int] = []

    class Hears(Callback):
        def epoch_done(self, block: int, epoch: int, loss: float) -> None:
            heard.append(block)

    quantized(name, callback=Hears(), wbits=4, abits=4, epochs=1)
    assert heard == [0, 1, 2, 3]
