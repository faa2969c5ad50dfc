"""Divergence from the original and agreement with it, by hand and through the command line."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import lrquant
from lrquant.errors import UsageError
from lrquant.evaluation import agreement
from lrquant.evaluation.perplexity import windows_of
from tests.cli.run import lrquant as run_lrquant
from tests.tiny import write_tiny


class Fixed(nn.Module):
    """Answers every token with the same logits."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_agreement_by_hand() -> None:
    half, quarter = math.log(0.5), math.log(0.25)
    original, model = Fixed([half, quarter, quarter]), Fixed([quarter, half, quarter])
    found = agreement(model, original, windows_of(torch.arange(10) % 3, 4, None))
    # 0.5·log(0.5/0.25) + 0.25·log(0.25/0.5) + 0 = 0.25·log 2
    assert found.divergence == pytest.approx(0.25 * math.log(2), rel=1e-6)
    assert (found.top1, found.windows, found.seqlen) == (0.0, 2, 4)
    assert agreement(model, model, windows_of(torch.arange(10) % 3, 4, 1)).top1 == 1.0


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="vocabularies have 2 and 3"):
        agreement(Fixed([0.0, 0.0]), Fixed([0.0, 0.0, 0.0]), torch.zeros(2, 4, dtype=torch.long))


def test_a_quantized_model_differs_from_its_original_which_does_not(tmp_path) -> None:
    tiny = str(write_tiny(tmp_path / "tiny"))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    recipe = lrquant.Recipe.preset("rtn", wbits=3, abits=8, calibration=str(text), nsamples=2, seqlen=16)
    lrquant.quantize(tiny, recipe, save_dir=tmp_path / "w3")
    for name, path in {"w3": str(tmp_path / "w3"), "itself": tiny}.items():
        command = ["eval", path, "--ppl", text, "--seqlen", 16, "--limit-windows", 3, "--against", tiny]
        done = run_lrquant(*command, "--json", tmp_path / f"{name}.json")
        assert done.returncode == 0, done.stderr
        assert "same top token" in done.stdout
    quantized, itself = (json.loads((tmp_path / f"{name}.json").read_text())["agreement"] for name in ("w3", "itself"))
    ((name, found),) = quantized.items()
    assert found["divergence"] > 1e-6
    assert itself[name] == {"divergence": pytest.approx(0.0, abs=1e-9), "top1": 1.0}
