"""The report of real runs: what it holds, that its numbers are right, and that making it changes nothing."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lrquant
from lrquant.errors import Interrupted
from lrquant.reconstruction.callbacks import Callback, Callbacks
from lrquant.report import figures
from lrquant.report.block_files import keep_block, kept_block
from lrquant.report.findings import findings, hardest_block
from lrquant.report.observer import Observer, choose_samples, mean_error
from lrquant.report.page import display_name, write_report
from lrquant.report.run import Block, Error, Errors, Metric, Run, load_run, read_run
from lrquant.report.style import between, canvas, drawing, to_svg
from tests.cli.run import Done
from tests.cli.run import lrquant as command
from tests.tiny import SETTINGS, write_tiny

COMMON = ["--calib", "zoo:pydoc", "--nsamples", 4, "--seqlen", 32, "--epochs", 2, "--batch-size", 2]


def quantize(model: Path, target: Path, *options: object) -> Done:
    return command("quantize", model, "--save-dir", target, *COMMON, *options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("made") / "w4a4"
    done = quantize(tiny, target, "--eval-ppl", "zoo:pydoc", "--limit-windows", 4)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    return target


def test_a_report_changes_nothing_of_the_result(tiny: Path, made: Path, tmp_path: Path) -> None:
    assert quantize(tiny, tmp_path / "bare", "--no-report").returncode == 0
    assert not (tmp_path / "bare" / "report.html").exists()
    for path in (tmp_path / "bare").iterdir():
        assert path.read_bytes() == (made / path.name).read_bytes(), path.name
    assert {path.name for path in made.iterdir()} - {path.name for path in (tmp_path / "bare").iterdir()} == {
        "report",
        "report.html",
    }


def test_the_page_is_one_file_that_fetches_and_runs_nothing(made: Path) -> None:
    page = (made / "report.html").read_text()
    assert "<script" not in page
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page
    addresses = set(re.findall(r'(?:src|href)="([^"#]{1,20})', page))
    assert all(address.startswith("data:") for address in addresses), addresses
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))  # figures keep apart
    assert "#110" not in page  # every stand-in colour became the page's


def test_the_page_has_the_whole_story(made: Path) -> None:
    page = (made / "report.html").read_text()
    for title in (
        "Error over depth",
        "Gain of smoothing and learning",
        "Direction of the output",
        "Loss over epochs",
        "Sensitivity of single layers",
        "Outlier channels before and after smoothing",
        "Learned scales and their initial values",
        "and their clipped range",
        "input of",
        "Change of perplexity by window",
        "peak memory",
        "was the hardest",
        "Smoothing",
    ):
        assert title in page, title
    assert f"lrquant quantize {made.parent.parent}" in page or "lrquant quantize" in page
    assert "wbits: 4" in page  # the recipe


def test_block_zero_inherits_nothing_and_errors_add_up(made: Path) -> None:
    first, second = (block.errors for block in read_run(made).blocks)
    assert first is not None
    assert second is not None
    assert first.inherited is not None
    assert first.inherited.relative == 0
    assert first.own == first.end  # both streams still are the same there
    assert second.inherited is not None
    assert first.end is not None
    assert second.inherited.relative > 0


def test_errors_are_those_of_the_model_that_was_made(tiny: Path) -> None:
    """The last block's error, measured from outside, on the samples that the observer looked at."""
    observer = Observer()
    recipe = lrquant.Recipe.preset("lrquant", **SETTINGS)
    original = lrquant.load(str(tiny))
    seen: list[torch.Tensor] = []
    samples = [torch.randint(0, 100, (1, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def last_hidden(model: Any, ids: torch.Tensor) -> torch.Tensor:
        handle = model.model.layers[-1].register_forward_hook(lambda *args: seen.append(args[2]))
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        handle.remove()
        output = seen.pop()
        return output[0] if isinstance(output, tuple) else output

    truth = [last_hidden(original, ids) for ids in samples]
    quantized = lrquant.quantize(lrquant.load(str(tiny)), recipe, calibration=samples, callback=observer)
    answers = [last_hidden(quantized.model, ids) for ids in samples]
    expected = mean_error((answer, true) for answer, true in zip(answers, truth, strict=True))
    errors = observer.blocks[-1].errors
    assert errors is not None
    assert errors.end is not None
    assert errors.end.relative == pytest.approx(expected.relative, rel=1e-4)
    assert errors.end.cosine == pytest.approx(expected.cosine, abs=1e-5)


def test_plain_rounding_is_what_rtn_leaves(tiny: Path) -> None:
    """The report of LRQuant names the error of rounding to nearest; a run of `rtn` ends there."""
    found = {}
    for method in ("rtn", "lrquant"):
        observer = Observer()
        lrquant.quantize(str(tiny), lrquant.Recipe.preset(method, **SETTINGS | {"epochs": 0}), callback=observer)
        found[method] = observer.blocks[0].errors
    assert found["rtn"] is not None
    assert found["lrquant"] is not None
    assert found["lrquant"].plain == found["rtn"].end
    assert found["rtn"].smoothed is None


def test_a_wide_layer_is_less_sensitive_with_more_bits(tiny: Path) -> None:
    by_bits = {}
    for bits in (2, 8):
        observer = Observer()
        recipe = lrquant.Recipe.preset("rtn", **SETTINGS, wbits=bits, abits=16)
        lrquant.quantize(str(tiny), recipe, callback=observer)
        by_bits[bits] = {entry.layer: entry.plain for entry in observer.blocks[0].sensitivity}
    assert len(by_bits[2]) == 7  # the linears of a Llama block
    assert all(by_bits[2][layer] > 10 * by_bits[8][layer] > 0 for layer in by_bits[2])


def test_smoothing_flattens_an_outlier_channel_and_the_page_says_so(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_tiny(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[5] *= 60
            layer.mlp.gate_proj.weight[:, 5] /= 60
            layer.mlp.up_proj.weight[:, 5] /= 60
    model.save_pretrained(folder)
    assert quantize(folder, tmp_path / "out").returncode == 0
    run = read_run(tmp_path / "out")
    fed_by_norm = next(kept for kept in run.blocks[0].inputs if "mlp.gate_proj" in kept.layers)
    assert fed_by_norm.layers == ["mlp.gate_proj", "mlp.up_proj"]
    assert fed_by_norm.outlier_ratio > 20
    assert fed_by_norm.smoothed_outlier_ratio is not None
    assert fed_by_norm.smoothed_outlier_ratio < fed_by_norm.outlier_ratio / 3
    assert "Smoothing helped" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_said_follows_the_numbers() -> None:
    def block(index: int, plain: float, smoothed: float, own: float) -> Block:
        errors = Errors(
            plain=Error(relative=plain, cosine=1),
            smoothing_start=Error(relative=smoothed, cosine=1),
            own=Error(relative=own, cosine=1),
            end=Error(relative=own, cosine=1),
        )
        return Block(index=index, path=f"layers.{index}", outcome="learned", errors=errors)

    def run(*blocks: Block) -> Run:
        return Run(
            kind="quantize",
            model="m",
            method="lrquant",
            format="W4A4",
            command="",
            recipe={},
            created="",
            seconds=1,
            device="cpu",
            blocks=list(blocks),
        )

    hurt = run(block(0, 0.1, 0.2, 0.1), block(1, 0.1, 0.3, 0.4), block(2, 0.1, 0.2, 0.2))
    titles = [finding.title for finding in findings(hurt)]
    assert "Smoothing hurt" in titles
    assert "Block 1 was the hardest" in titles
    helped = run(block(0, 0.2, 0.1, 0.3), block(1, 0.2, 0.1, 0.1))
    assert "Smoothing helped" in [finding.title for finding in findings(helped)]
    hardest = hardest_block(helped)
    assert hardest is not None
    assert hardest.index == 0
    odd = helped.blocks[1].model_copy(update={"outcome": "kept initial"})
    assert "1 block needs attention" in [finding.title for finding in findings(run(odd))]


def test_it_is_made_again_without_the_model(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "report").mkdir(parents=True)
    for path in (made / "report").iterdir():
        (copy / "report" / path.name).write_bytes(path.read_bytes())
    done = command("report", copy)
    assert done.returncode == 0, done.stderr
    assert (copy / "report.html").read_text() == (made / "report.html").read_text()


def test_several_runs_are_compared(tiny: Path, made: Path, tmp_path: Path) -> None:
    assert quantize(tiny, tmp_path / "rtn", "--method", "rtn", "--epochs", 0).returncode == 0
    done = command("report", made, tmp_path / "rtn", "--output", tmp_path / "both.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "both.html").read_text()
    assert "2 runs compared" in page
    assert "w4a4" in page
    table = command("compare", made, tmp_path / "rtn", "--json", tmp_path / "both.json")
    assert table.returncode == 0, table.stderr
    assert "hardest block" in table.stdout
    values = json.loads((tmp_path / "both.json").read_text())
    assert values[str(made)]["format"] == "W4A4"
    assert "perplexity zoo:pydoc" in values[str(made)]["metrics"]


def test_adapting_leaves_a_report_of_its_own(tiny: Path, made: Path, tmp_path: Path) -> None:
    done = command(
        "adapt", made, "--reference", tiny, "--data", "zoo:pycode", "--save-dir", tmp_path / "adapted",
        "--nsamples", 4, "--epochs", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run, _ = load_run(tmp_path / "adapted")
    assert run.kind == "adapt"
    assert [block.outcome == "not relearned" for block in run.blocks] == [True, False]
    windows = run.metrics[0].windows_after
    assert len(windows) == len(run.metrics[0].windows_before) == 32
    page = (tmp_path / "adapted" / "report.html").read_text()
    assert "Change of perplexity by window" in page
    assert re.search(r"Adaptation helped \d+ of 32 windows", page)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "report" / "run.json").unlink(), "no report data"),
        (lambda folder: (folder / "report" / "run.json").write_text('{"kind": "quantize"}'), "not the data of a run"),
        (lambda folder: (folder / "report" / "run.json").write_text("{"), "not the data of a run"),
        (lambda folder: (folder / "report" / "measurements.safetensors").write_bytes(b"x" * 20), "cannot be read"),
    ],
)
def test_damaged_data_is_one_line(made: Path, tmp_path: Path, harm: Any, message: str) -> None:
    (tmp_path / "report").mkdir()
    for path in (made / "report").iterdir():
        (tmp_path / "report" / path.name).write_bytes(path.read_bytes())
    harm(tmp_path)
    done = command("report", tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_the_bundled_models_report_is_small_and_quick(tmp_path: Path) -> None:
    done = command("quantize", "zoo:llama", "--save-dir", tmp_path / "out", *COMMON[:-4], "--epochs", 1)
    assert done.returncode == 0, done.stderr
    began = time.process_time()
    page = write_report(tmp_path / "out")
    assert time.process_time() - began < 10  # 3 s on an idle core
    assert page.stat().st_size < 3e6
    assert load_file(tmp_path / "out" / "report" / "measurements.safetensors")


def test_few_samples_are_looked_at_and_one_at_least() -> None:
    def stream(count: int, tokens: int) -> list[torch.Tensor]:
        return [torch.zeros(1, tokens, 2)] * count

    assert choose_samples(stream(128, 256)) == [0, 42, 85, 127]
    assert choose_samples(stream(128, 2048)) == [0]
    assert choose_samples(stream(2, 8)) == [0, 1]


def test_a_folder_is_shown_without_the_folders_above_it() -> None:
    assert display_name("/home/somebody/models/small") == "small"
    assert display_name("./here") == "here"
    assert display_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert display_name("zoo:llama") == "zoo:llama"


def test_a_long_text_is_drawn_in_parts(made: Path) -> None:
    run = read_run(made)
    values = [float(number) for number in range(226)]
    metric = Metric(name="perplexity", before=1.0, after=1.0, windows_before=values, windows_after=values)
    figure = figures.window_pairs(run.model_copy(update={"metrics": [metric]}))
    assert figure is not None
    points = [len(line.get_xdata()) for line in figure.axes[0].lines]
    assert points == [figures.MOST_BINS, figures.MOST_BINS]


def test_lines_of_many_blocks_take_the_page_s_colours() -> None:
    """A colour of its own would be invisible in dark mode."""
    with drawing():
        figure, axes = canvas(1.0)
        for share in (0.0, 0.5, 1.0):
            axes.plot([0, 1], color=between(share))
        svg = to_svg(figure, "lines", "lines")
    assert "#1200" not in svg
    assert svg.count("color-mix(in srgb, var(--final)") >= 3


def test_after_a_resume_the_report_is_complete(tiny: Path, tmp_path: Path) -> None:
    recipe = lrquant.Recipe.preset("lrquant", wbits=4, abits=4, **SETTINGS)

    class Stops(Callback):
        def block_done(self, record: Any) -> None:
            raise KeyboardInterrupt

    def run(target: Path, *before: Callback) -> tuple[Run, dict[str, torch.Tensor]]:
        lrquant.quantize(str(tiny), recipe, save_dir=target, callback=Callbacks(*before), report=True)
        return load_run(target)

    expected, measured = run(tmp_path / "whole")
    stopped = Observer()
    with pytest.raises(Interrupted, match="1 finished block is kept"):
        lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", callback=Callbacks(stopped, Stops()))
    found, again = run(tmp_path / "out")
    assert measured.keys() == again.keys()
    assert all(torch.equal(measured[name], again[name]) for name in measured)
    assert [block.restored for block in found.blocks] == [True, False]
    assert found.samples_looked_at == expected.samples_looked_at
    for before, after in zip(expected.blocks, found.blocks, strict=True):
        assert before.model_dump(exclude={"restored", "seconds"}) == after.model_dump(exclude={"restored", "seconds"})
    assert "finished before an interruption" in (tmp_path / "out" / "report.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


@pytest.mark.parametrize("damage", ["00000.json", "00000.safetensors"])
def test_damaged_measurements_of_a_finished_block_are_left_out(damage: str, tmp_path: Path) -> None:
    block = Block(index=0, path="a", outcome="learned", errors=Errors(), initial_loss=float("inf"))
    keep_block(tmp_path, block, {"0|x|clip": torch.ones(3)}, looked_at="4 samples")
    kept = kept_block(tmp_path, 0)
    assert kept is not None
    assert kept[0].block == block
    path = tmp_path / "report" / damage
    path.write_bytes(path.read_bytes()[:-2] + b"  ")
    assert kept_block(tmp_path, 0) is None
