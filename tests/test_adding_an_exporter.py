"""docs/adding-an-exporter.md is followed to the letter: its file writes an archive that holds every weight."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lrquant
from lrquant.errors import UsageError
from lrquant.export import registry
from tests.tiny import write_tiny

DOCUMENT = Path(__file__).parent.parent / "docs" / "adding-an-exporter.md"


@pytest.fixture
def defined() -> Iterator[dict[str, Any]]:
    """What the document's file defines; the registry forgets it afterwards."""
    before = dict(registry.EXPORTERS)
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert len(code.splitlines()) < 60
    found: dict[str, Any] = {}
    exec(code, found)
    yield found
    registry.EXPORTERS.clear()
    registry.EXPORTERS.update(before)


@pytest.mark.usefixtures("defined")
def test_the_archive_holds_every_weight(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model")
    recipe = lrquant.Recipe.preset(
        "rtn", calibration="zoo:pydoc", nsamples=2, seqlen=32, wbits=3, abits=16, group_size=32
    )
    lrquant.quantize(str(model), recipe, save_dir=tmp_path / "w3")
    written = registry.export(tmp_path / "w3", tmp_path / "w3.npz", "npz", dtype="f16")
    arrays, loaded = np.load(written.path), lrquant.load(str(tmp_path / "w3")).state_dict()
    linear = "model.layers.1.mlp.down_proj"
    steps = arrays[f"{linear}.q"].reshape(64, 4, 32).astype(np.float32) - arrays[f"{linear}.zero"][..., None]
    values = (steps * arrays[f"{linear}.scale"][..., None]).reshape(64, 128)
    # transformers multiplies asymmetric weights in the checkpoint's own precision, bfloat16.
    assert np.allclose(values, loaded[f"{linear}.weight"].numpy(), rtol=2**-8)
    assert arrays["model.norm.weight"].dtype == np.float16
    with pytest.raises(UsageError, match="dtype bf16: npz has f32, f16"):
        registry.export(tmp_path / "w3", tmp_path / "again.npz", "npz", dtype="bf16")
