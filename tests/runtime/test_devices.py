"""Which device a run takes."""

from typing import Any

import pytest
import torch

from lrquant.errors import UsageError
from lrquant.loading.pretrained import pick_device


def test_a_build_for_gpus_runs_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's usual build for Linux names CUDA as its accelerator on every machine; only asked, it looks for one."""

    def built_for_cuda(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for_cuda)
    assert pick_device("auto") == torch.device("cpu")


def test_an_accelerator_is_taken_and_can_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    there: Any = torch.device("meta")  # stands for a GPU: everything can be put there
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: there)
    assert pick_device("auto") == there
    assert pick_device("cpu") == torch.device("cpu")


def test_a_device_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"^device 'xpu' cannot be used here"):
        pick_device("xpu")
