"""The command line on the bundled models that see."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lrquant.zoo import shapes


def lrquant(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lrquant", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


FAST = ("--nsamples", 8, "--epochs", 1, "--wbits", 4, "--abits", 4)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled ViT at W4A4, calibrated on a folder of pictures of several modes."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(8):
        image, _ = shapes.draw_picture(index)
        image.convert(("RGB", "L", "RGBA", "P")[index % 4]).save(folder / f"{index}.png")
    saved = folder / "saved"
    done = lrquant("quantize", "zoo:vit", "--calib", folder, "--save-dir", saved, *FAST)
    assert done.returncode == 0, done.stderr
    return saved


def test_a_vit_is_quantized_on_a_folder_and_evaluated(vit: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    done = lrquant("eval", vit, "--images", "zoo:shapes", "--limit", 200, "--json", result)
    assert done.returncode == 0, done.stderr
    accuracy = json.loads(result.read_text())["accuracy"]["zoo:shapes"]
    assert accuracy["pictures"] == 200
    assert 0.6 < accuracy["top1"] <= accuracy["top5"] <= 1  # in full precision 0.94; guessing one of twenty is 0.05
    assert accuracy["loss"] < math.log(20)  # what knowing nothing costs


def test_a_saved_vit_classifies_without_lrquant(vit: Path) -> None:
    code = f"""
import sys
sys.modules["lrquant"] = None  # any import of it fails
from transformers import AutoImageProcessor, AutoModelForImageClassification
from PIL import Image
processor = AutoImageProcessor.from_pretrained({str(vit)!r})
model = AutoModelForImageClassification.from_pretrained({str(vit)!r})
logits = model(**processor(images=Image.new("RGB", (60, 50), "red"), return_tensors="pt")).logits
assert tuple(logits.shape) == (1, 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_both_towers_of_the_bundled_llava_and_an_answer_without_lrquant(tmp_path: Path) -> None:
    saved, result = tmp_path / "saved", tmp_path / "result.json"
    towers = ("--towers", "language,vision")
    done = lrquant("quantize", "zoo:llava", "--calib", "zoo:shapes-vqa", "--save-dir", saved, *towers, *FAST)
    assert done.returncode == 0, done.stderr
    done = lrquant("eval", saved, "--vqa", "zoo:shapes-vqa", "--limit", 40, "--json", result)
    assert done.returncode == 0, done.stderr
    answers = json.loads(result.read_text())["answers"]["zoo:shapes-vqa"]
    assert answers["questions"] == 40
    assert answers["exact_match"] > 0.5  # guessing among the answers of each kind of question is 0.27
    code = f"""
import sys
sys.modules["lrquant"] = None  # any import of it fails
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image, ImageDraw
picture = Image.new("RGB", (48, 48), (128, 128, 128))
ImageDraw.Draw(picture).ellipse((17, 17, 31, 31), fill=(48, 92, 214))
processor = AutoProcessor.from_pretrained({str(saved)!r})
model = AutoModelForImageTextToText.from_pretrained({str(saved)!r})
content = [{{"type": "image"}}, {{"type": "text", "text": "How many shapes are there?"}}]
text = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(images=picture, text=text, return_tensors="pt")
model(**inputs)  # unpacks the weights, as the model card says
ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
print(processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "one"


def damaged(folder: Path) -> Path:
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def empty(folder: Path) -> Path:
    return folder


def questions_without_pictures(folder: Path) -> Path:
    (folder / "asked.jsonl").write_text('{"text": "What is this?"}\n')
    return folder / "asked.jsonl"


def grey(folder: Path) -> Path:
    Image.new("I;16", (10, 20)).save(folder / "grey.png")
    return folder


@pytest.mark.parametrize(
    ("model", "calib", "more", "line"),
    [
        ("zoo:vit", damaged, (), "broken.png"),
        ("zoo:vit", empty, (), "no image in this folder"),
        ("zoo:vit", grey, ("--nsamples", 2), "1 images are not enough for 2 samples"),
        ("zoo:vit", "wikitext2", (), "wikitext2 is text"),
        ("zoo:vit", "zoo:shapes", ("--towers", "language"), "towers 'language': a vit model has vision"),
        ("zoo:llava", questions_without_pictures, (), "asked.jsonl:1: this text has no image"),
        ("zoo:llava", "zoo:shapes", (), "images without text"),
        ("zoo:llava", "zoo:shapes-vqa", ("--towers", "sound"), "towers"),
    ],
)
def test_wrong_use_is_one_line(model, calib, more, line: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = calib(tmp_path / "in") if callable(calib) else calib
    saved = tmp_path / "saved"
    done = lrquant("quantize", model, "--calib", source, "--save-dir", saved, "--nsamples", 1, *more)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert line in done.stderr
    assert not saved.exists()


@pytest.mark.parametrize(
    ("model", "option", "line"), [("zoo:vit", "--vqa", "takes image"), ("zoo:llava", "--images", "takes image+text")]
)
def test_measuring_the_wrong_thing_is_one_line(model: str, option: str, line: str) -> None:
    done = lrquant("eval", model, option, "zoo:shapes")
    assert done.returncode == 2
    assert line in done.stderr
