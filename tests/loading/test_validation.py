"""Fuzzing what strangers hand in: recipes, manifests, configurations give an error of ours or a valid result."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import lrquant
from lrquant import LrquantError, Recipe, UsageError
from lrquant.loading.validation import check_folder, weight_files
from lrquant.method_presets import PRESETS
from lrquant.reconstruction.records import BlockRecord
from lrquant.resume.manifest import BlockEntry, Placing, RunEntry, read_entry, write_entry
from tests.tiny import write_tiny

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["log", "mse", "on", "vision", "auto", *PRESETS])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.dictionaries(st.sampled_from(list(Recipe.model_fields)) | st.text(max_size=8), VALUES, max_size=6)


def one_line(error: LrquantError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 2000


def written(content: bytes, name: str) -> Path:
    path = Path(tempfile.mkdtemp()) / name
    path.write_bytes(content)
    return path


@given(values=FIELDS)
def test_a_recipe_is_valid_or_an_error_of_one_line(values: dict[str, Any]) -> None:
    try:
        recipe = Recipe.parse(values)
    except UsageError as error:
        one_line(error)
        return
    again = Recipe.from_yaml(written(recipe.to_yaml().encode(), "recipe.yaml"))
    assert again == recipe


@given(text=st.text(alphabet="wbits: 4\n-[]{}&*!|>'\"#%@,?\t\\x0", max_size=60) | st.binary(max_size=60))
def test_a_recipe_file_is_valid_or_an_error_of_one_line(text: str | bytes) -> None:
    path = written(text if isinstance(text, bytes) else text.encode(), "recipe.yaml")
    try:
        Recipe.from_yaml(path)
    except UsageError as error:
        one_line(error)


ENTRY = BlockEntry(
    path="model.layers.0",
    bytes=10,
    sha256="0" * 64,
    after="",
    flat_inputs=["a"],
    added_biases=[],
    record=BlockRecord(0, 1.0, float("inf"), "learned", [0.5, 0.1], 1, 2.0, 0.9),
)
ENTRIES: list[BaseModel] = [
    ENTRY,
    RunEntry(layout=2, identity={"a": "b"}),
    Placing(files={"a": "b"}, identity={"c": "d"}),
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: type(entry).__name__)
def test_an_entry_comes_back_as_it_was(entry: BaseModel, tmp_path: Path) -> None:
    write_entry(tmp_path / "entry.json", entry)
    assert read_entry(tmp_path / "entry.json", type(entry)) == entry


@pytest.mark.parametrize("kind", [BlockEntry, RunEntry, Placing])
@given(values=VALUES, checksummed=st.booleans())
def test_a_strange_entry_is_an_error(kind: type[BaseModel], values: Any, checksummed: bool) -> None:
    """Also when its author made a checksum to go with it."""
    from lrquant.resume.manifest import _checksum

    wrapped = {"sha256": _checksum(values), "entry": values} if checksummed else values
    path = written(json.dumps(wrapped).encode(), "entry.json")
    try:
        read = read_entry(path, kind)
    except LrquantError as error:
        one_line(error)
    else:
        assert isinstance(read, kind)


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_in_an_entry_is_noticed(place: int, bit: int) -> None:
    path = written(b"", "entry.json")
    write_entry(path, ENTRY)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        assert read_entry(path, BlockEntry) == ENTRY  # between values, white space may change
    except LrquantError:
        pass


@given(content=st.binary(max_size=80))
def test_an_entry_of_any_bytes_is_an_error(content: bytes) -> None:
    with pytest.raises(LrquantError):
        read_entry(written(content, "entry.json"), RunEntry)


@given(config=VALUES, index=VALUES, weights=st.binary(max_size=40))
def test_a_folder_of_any_content_is_an_error(config: Any, index: Any, weights: bytes) -> None:
    folder = written(json.dumps(config).encode(), "config.json").parent
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(LrquantError):
        check_folder(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    try:
        assert all(file.parent == folder for file in weight_files(folder))
    except LrquantError as error:
        one_line(error)


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_code_in_a_model_s_folder_runs_only_when_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model, marker = write_tiny(tmp_path / "tiny"), tmp_path / "it-ran"
    (model / "own_code.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((model / "config.json").read_text())
    classes = {"AutoConfig": "own_code.Config", "AutoModelForCausalLM": "own_code.Model"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": classes}))
    ids = [torch.arange(first, first + 16)[None] for first in (0, 100)]
    rtn = Recipe.preset("rtn", wbits=8)
    with pytest.raises(LrquantError) as refused:
        lrquant.quantize(str(model), rtn, calibration=ids, save_dir=tmp_path / "out")
    one_line(refused.value)
    assert "the model needs its own code; --trust-remote-code allows it to run" in str(refused.value)
    assert not marker.exists()
    lrquant.quantize(str(model), rtn, calibration=ids, save_dir=tmp_path / "out", trust_remote_code=True)
    assert marker.exists()
