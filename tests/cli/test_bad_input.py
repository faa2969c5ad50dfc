"""Bad input: one clear line, the right exit code, and nothing left behind."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.run import lrquant
from tests.tiny import write_tiny

QUICK = ["--method", "rtn", "--calib", "zoo:pydoc", "--nsamples", "2", "--seqlen", "32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def quantize(*arguments: Any) -> Callable[[Path, Path], list[Any]]:
    """A case that quantizes the tiny model with `arguments` after the quick ones (the last of an option wins)."""
    return lambda tiny, tmp: ["quantize", tiny, *QUICK, *arguments, "--save-dir", tmp / "out"]


def with_files(make: Callable[[Path, Path], list[Any]]) -> Callable[[Path, Path], list[Any]]:
    return make


def text_file(text: str) -> Callable[[Path, Path], list[Any]]:
    def case(tiny: Path, tmp: Path) -> list[Any]:
        (tmp / "text.txt").write_text(text)
        return ["quantize", tiny, *QUICK, "--calib", tmp / "text.txt", "--save-dir", tmp / "out"]

    return case


def recipe_file(text: str) -> Callable[[Path, Path], list[Any]]:
    def case(tiny: Path, tmp: Path) -> list[Any]:
        (tmp / "recipe.yaml").write_text(text)
        return ["quantize", tiny, "--recipe", tmp / "recipe.yaml", "--save-dir", tmp / "out"]

    return case


def damaged(change: Callable[[Path], None]) -> Callable[[Path, Path], list[Any]]:
    def case(tiny: Path, tmp: Path) -> list[Any]:
        shutil.copytree(tiny, tmp / "model")
        change(tmp / "model")
        return ["quantize", tmp / "model", *QUICK, "--save-dir", tmp / "out"]

    return case


def truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def damaged_result(change: Callable[[Path], None]) -> Callable[[Path, Path], list[Any]]:
    """A quantized model that something happened to afterwards."""

    def case(tiny: Path, tmp: Path) -> list[Any]:
        lrquant("quantize", tiny, *QUICK, "--save-dir", tmp / "quantized", "--no-report")
        change(tmp / "quantized")
        return ["eval", tmp / "quantized", "--ppl", "zoo:pydoc", "--seqlen", 32, "--limit-windows", 1]

    return case


def flip(model: Path) -> None:
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1000] ^= 1
    (model / "model.safetensors").write_bytes(weights)


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def on(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return on


def lose_a_shard(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    (model / "model.safetensors").unlink()
    save_file(
        {name: tensors[name] for name in names[::2]}, model / "model-00001-of-00002.safetensors", {"format": "pt"}
    )
    index = {name: f"model-0000{1 + position % 2}-of-00002.safetensors" for position, name in enumerate(names)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def nan_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path("exploded").touch, ())  # in the working directory, where the test would find it


def only_a_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def disguised_pickle(model: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(Bomb()))


def index(weight_map: Any) -> Callable[[Path], None]:
    """The weights in one shard under an index of our own."""

    def on(model: Path) -> None:
        (model / "model.safetensors").rename(model / "shard.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return on


def config(**changes: Any) -> Callable[[Path], None]:
    def on(model: Path) -> None:
        values = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(values | changes))

    return on


def raw(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(content) and None


def without_tokenizer(model: Path) -> None:
    for path in model.glob("*token*"):
        path.unlink()


def huge_tokenizer(model: Path) -> None:
    os.truncate(model / "tokenizer.json", 3 << 30)  # a sparse file


def a_fifo(name: str) -> Callable[[Path], None]:
    def on(model: Path) -> None:
        (model / name).unlink()
        os.mkfifo(model / name)

    return on


def shards_without_index(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")


def unfinished(content: str | None) -> Callable[[Path, Path], list[Any]]:
    """A run's folder with this in place of its description; None: a FIFO."""

    def case(tiny: Path, tmp: Path) -> list[Any]:
        (tmp / ".out.lrquant").mkdir()
        (tmp / ".out.lrquant" / "lock").write_text("lrquant 1\n")
        (tmp / ".out.lrquant" / "00000.json").write_text("{}")  # a block: the folder is worth keeping
        if content is None:
            os.mkfifo(tmp / ".out.lrquant" / "run.json")
        else:
            (tmp / ".out.lrquant" / "run.json").write_text(content)
        return ["quantize", tiny, *QUICK, "--save-dir", tmp / "out"]

    return case


def below_a_file(tiny: Path, tmp: Path) -> list[Any]:
    (tmp / "file").touch()
    return ["quantize", tiny, *QUICK, "--save-dir", tmp / "file" / "out"]


def an_empty_folder(tiny: Path, tmp: Path) -> list[Any]:
    (tmp / "texts").mkdir()
    return ["quantize", tiny, *QUICK, "--calib", tmp / "texts", "--save-dir", tmp / "out"]


def calibration_file(name: str, content: bytes) -> Callable[[Path, Path], list[Any]]:
    def case(tiny: Path, tmp: Path) -> list[Any]:
        (tmp / name).write_bytes(content)
        return ["quantize", tiny, *QUICK, "--calib", tmp / name, "--save-dir", tmp / "out"]

    return case


def occupied(tiny: Path, tmp: Path) -> list[Any]:
    (tmp / "out").mkdir()
    (tmp / "out" / "precious.txt").write_text("mine")
    return ["quantize", tiny, *QUICK, "--save-dir", tmp / "out"]


def save_dir_is_a_file(tiny: Path, tmp: Path) -> list[Any]:
    (tmp / "out").write_text("mine")
    return ["quantize", tiny, *QUICK, "--save-dir", tmp / "out"]


def command(*words: Any) -> Callable[[Path, Path], list[Any]]:
    """A case of another command: TINY stands for the tiny model, TMP and TMP/NAME for places in the test's folder."""

    def case(tiny: Path, tmp: Path) -> list[Any]:
        known = {"TINY": tiny, "TMP": tmp}
        return [known.get(word) or (tmp / word[4:] if str(word).startswith("TMP/") else word) for word in words]

    return case


def calibration_link(target: str) -> Callable[[Path, Path], list[Any]]:
    def case(tiny: Path, tmp: Path) -> list[Any]:
        (tmp / "text.txt").symlink_to(target)
        return ["quantize", tiny, *QUICK, "--calib", tmp / "text.txt", "--save-dir", tmp / "out"]

    return case


def calibration_fifo(tiny: Path, tmp: Path) -> list[Any]:
    os.mkfifo(tmp / "text.txt")
    return ["quantize", tiny, *QUICK, "--calib", tmp / "text.txt", "--save-dir", tmp / "out"]


def a_strangers_run_folder(tiny: Path, tmp: Path) -> list[Any]:
    (tmp / ".out.lrquant").mkdir()
    (tmp / ".out.lrquant" / "mine.txt").write_text("mine")
    return ["quantize", tiny, *QUICK, "--restart", "--save-dir", tmp / "out"]


def a_run_folder_that_is_a_link(tiny: Path, tmp: Path) -> list[Any]:
    (tmp / "other").mkdir()
    (tmp / "other" / "mine.txt").write_text("mine")
    (tmp / ".out.lrquant").symlink_to(tmp / "other")
    return ["quantize", tiny, *QUICK, "--restart", "--save-dir", tmp / "out"]


def in_place_of_the_weights(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def on(model: Path) -> None:
        (model / "model.safetensors").unlink()
        make(model / "model.safetensors")

    return on


# name → (exit code, what the line says, the command)
CASES: dict[str, tuple[int, str, Callable[[Path, Path], list[Any]]]] = {
    "unknown model": (
        2,
        "not a local folder",
        lambda tiny, tmp: ["quantize", "no/such", *QUICK, "--save-dir", tmp / "out"],
    ),
    "model name": (
        2,
        "neither an existing folder",
        lambda tiny, tmp: ["quantize", "a/b/c!", *QUICK, "--save-dir", tmp / "out"],
    ),
    "unknown zoo model": (
        2,
        "zoo:llama",
        lambda tiny, tmp: ["quantize", "zoo:camel", *QUICK, "--save-dir", tmp / "out"],
    ),
    "empty folder": (2, "no config.json", lambda tiny, tmp: ["quantize", tmp, *QUICK, "--save-dir", tmp / "out"]),
    "unknown dataset": (2, "neither a data set", quantize("--calib", "wikitext3")),
    "unknown zoo text": (2, "zoo:pydoc, zoo:pycode", quantize("--calib", "zoo:pydocs")),
    "unreachable dataset": (1, "cannot be fetched", quantize("--calib", "wikitext2")),
    "unknown method": (2, "unknown method 'gptq'", quantize("--method", "gptq")),
    "one bit": (2, "wbits = 1", quantize("--wbits", 1)),
    "seventeen bits": (2, "wbits = 17", quantize("--wbits", 17)),
    "no bits": (2, "abits = 0", quantize("--abits", 0)),
    "nothing to do": (2, "nothing would be quantized", quantize("--wbits", 16, "--abits", 16)),
    "group size": (2, "group size 48 does not divide the 64", quantize("--group-size", 48)),
    "negative group": (2, "group_size", quantize("--group-size", -1)),
    "negative epochs": (2, "epochs", quantize("--epochs", -1)),
    "no samples": (2, "nsamples", quantize("--nsamples", 0)),
    "learning rate": (2, "let_lr", quantize("--let-lr", 0)),
    "too long": (2, "128 positions", quantize("--seqlen", 4096)),
    "too little text": (2, "tokens are not enough for 2 samples of 32", text_file("A few words.")),
    "empty text": (2, "it contains no text", text_file("  \n ")),
    "device": (2, "device 'cuda:7'", quantize("--device", "cuda:7")),
    "device name": (2, "device 'gpu'", quantize("--device", "gpu")),
    "json folder": (2, "its folder does not exist", quantize("--json", "/no/such/folder/x.json")),
    "json in a place for no files": (2, "--json /proc/x.json: cannot be written", quantize("--json", "/proc/x.json")),
    "json into a folder": (2, "--json /: this is a folder", quantize("--json", "/")),
    "statistics into a folder": (2, "--save-statistics /: this is a folder", quantize("--save-statistics", "/")),
    "log file": (2, "--log-file /proc/x: cannot be written", quantize("--log-file", "/proc/x")),
    "a name of 250 letters": (
        2,
        "the name is longer than 247 bytes",
        lambda tiny, tmp: ["quantize", tiny, *QUICK, "--save-dir", tmp / ("x" * 250)],
    ),
    "a device": (2, "is a file", lambda tiny, tmp: ["quantize", tiny, *QUICK, "--save-dir", "/dev/null"]),
    "occupied": (2, "is not empty", occupied),
    "a file": (2, "is a file", save_dir_is_a_file),
    "not writable": (
        2,
        "cannot be written",
        lambda tiny, tmp: ["quantize", tiny, *QUICK, "--save-dir", "/proc/lrquant/out"],
    ),
    "truncated shard": (1, "damaged", damaged(truncate)),
    "truncated result": (1, "damaged", damaged_result(truncate)),
    "flipped bit in a result": (1, "model.safetensors: damaged (its checksum", damaged_result(flip)),
    "missing shard": (1, "model-00002-of-00002.safetensors", damaged(lose_a_shard)),
    "missing weight": (1, "lacks 1 weights", damaged(rewrite(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")))),
    "nan weight": (1, "model.layers.0.mlp.up_proj.weight holds NaN", damaged(rewrite(nan_weight))),
    "config": (1, "cannot be loaded", damaged(lambda model: (model / "config.json").write_text("{") and None)),
    "model type": (
        1,
        "cannot be loaded",
        damaged(lambda m: (m / "config.json").write_text('{"model_type": "camel"}') and None),
    ),
    "misspelt key": (2, "unknown recipe key 'wbit'", recipe_file("method: rtn\nwbit: 4\n")),
    "recipe method": (2, "unknown method 'lrquant++'", recipe_file("method: lrquant++\n")),
    "recipe type": (2, "epochs", recipe_file("epochs: many\n")),
    "recipe is a list": (2, "a recipe is a mapping", recipe_file("- wbits\n")),
    "recipe is not YAML": (2, "not valid YAML", recipe_file("wbits: [4\n")),
    "recipe with code": (2, "not valid YAML", recipe_file("wbits: !!python/object/apply:os.getcwd []\n")),
    "no recipe": (
        2,
        "cannot read",
        lambda tiny, tmp: ["quantize", tiny, "--recipe", tmp / "no.yaml", "--save-dir", tmp / "out"],
    ),
    "recipe and method": (
        2,
        "not both",
        lambda tiny, tmp: ["quantize", tiny, "--recipe", tmp / "no.yaml", "--method", "rtn", "--save-dir", tmp / "out"],
    ),
    "misspelt option": (2, "No such option", quantize("--wbit", 4)),
    "statistics": (2, "not a file of channel statistics", quantize("--statistics", "/etc/hostname")),
    # What a stranger's model may hold.
    "only a pickle": (1, "pytorch_model.bin is a pickle, which can run code", damaged(only_a_pickle)),
    "a pickle under another name": (1, "damaged", damaged(disguised_pickle)),
    "index that leaves the folder": (
        1,
        "names '../../secret.safetensors', which is not a file of this folder",
        damaged(index({"model.norm.weight": "../../secret.safetensors"})),
    ),
    "index with an absolute path": (
        1,
        "not a file of this folder",
        damaged(index({"model.norm.weight": "/etc/passwd"})),
    ),
    "index of numbers": (1, "no weight_map of file names", damaged(index({"model.norm.weight": 7}))),
    "index without a map": (1, "no weight_map of file names", damaged(index(None))),
    "index that is no JSON": (1, "cannot be loaded", damaged(raw("model.safetensors.index.json", b"{{"))),
    "header of absurd length": (1, "damaged", damaged(raw("model.safetensors", b"\xff" * 8 + b"{}"))),
    "empty weights": (1, "damaged", damaged(raw("model.safetensors", b""))),
    "billions of layers": (
        1,
        "num_hidden_layers = 1e+09, but there are 20 weights in all",
        damaged(config(num_hidden_layers=10**9)),
    ),
    "a layer of terabytes": (1, "intermediate_size = 1e+12, but no weight", damaged(config(intermediate_size=10**12))),
    "a number of 4000 digits": (
        1,
        "no weight is that large",
        damaged(lambda m: raw("config.json", b'{"model_type": "llama", "head_dim": 1' + b"0" * 4000 + b"}")(m)),
    ),
    "text for a number": (1, "cannot be loaded", damaged(config(hidden_size="many"))),
    "no heads": (1, "num_attention_heads = 0, which is not valid", damaged(config(num_attention_heads=0))),
    "fewer layers than weights": (1, "cannot be loaded", damaged(config(hidden_size=32))),
    "a nested configuration": (
        1,
        "cannot be loaded",
        damaged(raw("config.json", b'{"a":' * 50_000 + b"1" + b"}" * 50_000)),
    ),
    "a configuration nested a little": (
        1,
        "nested deeper than 32",
        damaged(raw("config.json", b'{"a":' * 40 + b"1" + b"}" * 40)),
    ),
    "a configuration that is a list": (1, "not a mapping", damaged(raw("config.json", b"[]"))),
    "a configuration that is no text": (1, "cannot be loaded", damaged(raw("config.json", b"\x80\x81\xff"))),
    "a configuration of megabytes": (
        1,
        "larger than",
        damaged(raw("config.json", b'{"a": "' + b"x" * 9_000_000 + b'"}')),
    ),
    "remote code": (
        1,
        "the model needs its own code; --trust-remote-code allows it to run",
        damaged(config(model_type="own", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})),
    ),
    "a broken tokenizer": (1, "cannot be loaded", damaged(raw("tokenizer.json", b"{"))),
    "a weight of another shape": (
        1,
        "cannot be loaded",
        damaged(rewrite(lambda t: t.update({"model.norm.weight": torch.ones(3)}))),
    ),
    "a block of zeros": (
        1,
        "model.layers.0: every weight is zero",
        damaged(rewrite(lambda t: [v.zero_() for n, v in t.items() if n.startswith("model.layers.0.")] and None)),
    ),
    "infinite weight": (
        1,
        "model.layers.0.mlp.down_proj.weight holds NaN or infinite",
        damaged(rewrite(lambda t: t["model.layers.0.mlp.down_proj.weight"].fill_(torch.inf))),
    ),
    "no layers": (1, "num_hidden_layers = 0, which is not valid", damaged(config(num_hidden_layers=0))),
    "less than no layers": (1, "num_hidden_layers = -1", damaged(config(num_hidden_layers=-1))),
    "no vocabulary": (1, "vocab_size = 0", damaged(config(vocab_size=0))),
    "a negative head": (1, "head_dim = -16", damaged(config(head_dim=-16))),
    "an unknown activation": (1, "cannot be loaded", damaged(config(hidden_act="gelux"))),
    "an unknown rotary embedding": (1, "cannot be loaded", damaged(config(rope_parameters={"rope_type": "spiral"}))),
    "a corrupt generation config": (1, "cannot be loaded", damaged(raw("generation_config.json", b"{"))),
    "kernels from the hub": (
        1,
        "_attn_implementation = 'kernels-community/x' is code from the hub",
        damaged(config(_attn_implementation="kernels-community/x")),
    ),
    "shards without an index": (1, "which lists their tensors", damaged(shards_without_index)),
    "no tokenizer": (1, "has no tokenizer", damaged(without_tokenizer)),
    "a tokenizer of gigabytes": (1, "tokenizer.json: larger than", damaged(huge_tokenizer)),
    "a tokenizer that never ends": (1, "tokenizer.json: not a regular file", damaged(a_fifo("tokenizer.json"))),
    "a configuration that never ends": (2, "no config.json", damaged(a_fifo("config.json"))),
    # Recipes.
    "recipe with a bomb": (2, "aliases are not allowed", recipe_file("a: &a [x]\nb: [*a, *a]\n")),
    "recipe with a key twice": (2, "the key 'wbits' appears twice", recipe_file("wbits: 4\nwbits: 8\n")),
    "recipe of a thousand levels": (2, "not valid YAML", recipe_file("wbits: " + "[" * 2000 + "]" * 2000)),
    "recipe of megabytes": (2, "too large for a recipe", recipe_file("# " + "x" * 2_000_000)),
    "recipe that is a folder": (
        2,
        "cannot read the recipe",
        lambda tiny, tmp: ["quantize", tiny, "--recipe", tmp, "--save-dir", tmp / "out"],
    ),
    "recipe with a huge number": (2, "nsamples", recipe_file("nsamples: 1" + "0" * 40)),
    "recipe with a huger number": (2, "nsamples", recipe_file("nsamples: 1" + "0" * 4000)),
    "recipe with no number": (2, "let_lr", recipe_file("let_lr: .nan")),
    "recipe with infinity": (2, "let_lr", recipe_file("let_lr: .inf")),
    "recipe with a negative seed": (2, "seed", recipe_file("seed: -1")),
    "recipe with a list for a name": (2, "init", recipe_file("init: [log]")),
    "recipe with null": (2, "wbits", recipe_file("wbits: null")),
    # Options.
    "where activations live": (2, "Invalid value", quantize("--activations", "tape")),
    "half precision": (2, "Invalid value", quantize("--dtype", "float16")),
    "alpha": (2, "alpha", quantize("--alpha", 2)),
    "rotation rank": (2, "rotation_rank", quantize("--rotation-rank", 0)),
    "a batch of nothing": (2, "batch_size", quantize("--batch-size", 0)),
    "an unknown tower": (2, "towers", quantize("--towers", "tail")),
    "a tower that it has not": (2, "towers 'vision'", quantize("--towers", "vision")),
    "a part that it has not": (2, "extra 'projector'", quantize("--extra", "projector")),
    "a tied head": (2, "is tied to the embedding", quantize("--extra", "head")),
    "no windows": (2, "Invalid value", quantize("--eval-ppl", "zoo:pydoc", "--limit-windows", 0)),
    "adaptation to nothing": (2, "--tta adapts to evaluation texts", quantize("--tta")),
    "below a file": (2, "cannot be written", below_a_file),
    # Calibration files.
    "an empty folder of texts": (2, "no .", an_empty_folder),
    "a text in no encoding": (2, "cannot be read as text", calibration_file("a.txt", b"\xff\xfe\x81")),
    "a table without text": (2, "needs a column named 'text'", calibration_file("a.jsonl", b'{"n": 1}\n')),
    "a broken table": (2, "not a readable", calibration_file("a.jsonl", b'{"text": \n')),
    "a parquet that is none": (2, "not a readable parquet", calibration_file("a.parquet", b"PAR1 and so on")),
    "a picture for a text": (2, "text is read from", calibration_file("a.png", b"\x89PNG")),
    # Unfinished runs that others left.
    "a run that never ends": (2, "cannot be read; start over with --restart", unfinished(None)),
    "a damaged run": (2, "cannot be read; start over with --restart", unfinished("{")),
    "a run of something else": (2, "damaged (its checksum does not match)", unfinished('{"sha256": "0", "entry": {}}')),
    "adapting what is no checkpoint": (
        2,
        "not a checkpoint that lrquant wrote",
        lambda tiny, tmp: ["adapt", tiny, "--reference", tiny, "--data", "zoo:pydoc", "--save-dir", tmp / "out"],
    ),
    "eval nothing": (2, "nothing to measure: name a text", lambda tiny, tmp: ["eval", tiny]),
    "eval unknown": (2, "neither a data set", lambda tiny, tmp: ["eval", tiny, "--ppl", "nothing"]),
    "eval short": (2, "less than one window", lambda tiny, tmp: ["eval", tiny, "--ppl", tiny / "short.txt"]),
    # More of what a configuration may say.
    "no key/value heads": (1, "num_key_value_heads = 0, which is not valid", damaged(config(num_key_value_heads=0))),
    "heads that do not fit": (1, "the configuration expects (48, 64)", damaged(config(num_key_value_heads=3))),
    "a negative width": (1, "hidden_size = -64, which is not valid", damaged(config(hidden_size=-64))),
    "a list for a number": (1, "cannot be loaded", damaged(config(hidden_size=[64]))),
    "layers in words": (1, "cannot be loaded", damaged(config(num_hidden_layers="two"))),
    "half a layer": (1, "cannot be loaded", damaged(config(num_hidden_layers=2.5))),
    "an epsilon in words": (1, "cannot be loaded", damaged(config(rms_norm_eps="small"))),
    "a vocabulary of billions": (1, "vocab_size = 1e+09, but no weight", damaged(config(vocab_size=10**9))),
    "a class that is a number": (1, "cannot be loaded", damaged(config(architectures=7))),
    "an unknown dtype": (1, "cannot be loaded", damaged(config(dtype="float13"))),
    "a quantization that is a number": (1, "cannot be loaded", damaged(config(quantization_config=7))),
    "an unknown quantization": (
        2,
        "already quantized (magic)",
        damaged(config(quantization_config={"quant_method": "magic"})),
    ),
    "an encoder with a decoder": (
        2,
        "has an encoder and a decoder",
        damaged(config(model_type="t5", is_encoder_decoder=True)),
    ),
    "a tokenizer that is a list": (1, "cannot be loaded", damaged(raw("tokenizer.json", b"[]"))),
    "an empty tokenizer": (1, "cannot be loaded", damaged(raw("tokenizer.json", b""))),
    "a broken tokenizer config": (1, "cannot be loaded", damaged(raw("tokenizer_config.json", b"{"))),
    "a generation config that is a list": (1, "cannot be loaded", damaged(raw("generation_config.json", b"[]"))),
    # More of what may stand in the place of weights.
    "a folder for weights": (1, "has no model.safetensors", damaged(in_place_of_the_weights(Path.mkdir))),
    "weights that never end": (
        1,
        "has no model.safetensors",
        damaged(in_place_of_the_weights(lambda path: path.symlink_to("/dev/zero"))),
    ),
    "weights of integers": (
        1,
        "model.norm.weight is stored as I8",
        damaged(rewrite(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))),
    ),
    "complex weights": (
        1,
        "model.norm.weight is stored as C64",
        damaged(rewrite(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.complex64)}))),
    ),
    "one layer more": (
        1,
        "its files hold model.layers.5, but its configuration has only 2 blocks",
        damaged(rewrite(lambda t: t.update({"model.layers.5.mlp.up_proj.weight": torch.ones(128, 64)}))),
    ),
    # Files and folders that are not ours.
    "a text that never ends": (2, "text.txt: not a regular file", calibration_link("/dev/zero")),
    "a text that never begins": (2, "text.txt: not a regular file", calibration_fifo),
    "a stranger's run folder": (2, "did not create this one; move it away", a_strangers_run_folder),
    "a run folder that is a link": (2, "did not create this one; move it away", a_run_folder_that_is_a_link),
    "a text of another kind": (2, "not .csv", calibration_file("a.csv", b"a,b\n")),
    "a table of lists": (2, "needs a column named 'text'", calibration_file("a.jsonl", b"[1]\n")),
    "a table of nothing": (2, "needs a column named 'text'", calibration_file("a.jsonl", b'{"text": null}\n')),
    "a table of bytes": (2, "not a readable json", calibration_file("a.jsonl", b"\x00\x01\x02")),
    "an empty table": (2, "it contains no text", calibration_file("a.parquet", b"")),
    "conversations without a template": (2, "no chat template", calibration_file("a.jsonl", b'{"messages": []}\n')),
    # More options.
    "an unknown program": (2, "no runtime 'tgi': there are vllm", quantize("--for", "tgi")),
    "a format that the program lacks": (
        2,
        "does not run in llama.cpp",
        quantize("--for", "llama.cpp", "--format", "nvfp4"),
    ),
    "an unknown format": (2, "unknown format 'w5'", quantize("--format", "w5")),
    "a format and other bits": (2, "leave out one of the two", quantize("--format", "w4a16-g128", "--wbits", 3)),
    "one bit on average": (2, "target_bits = 1.0", quantize("--target-bits", 1)),
    "an average of floats": (2, "with integer weights only", quantize("--format", "nvfp4", "--target-bits", 4)),
    "no window": (2, "window = 0", quantize("--window", 0)),
    "a window that stays": (2, "the overlap must be smaller", quantize("--window", 2, "--window-overlap", 2)),
    "an unknown rounding": (2, "Invalid value", quantize("--rounding", "stochastic")),
    "an unknown rotation": (2, "rotate.0 = 'sideways'", quantize("--rotate", "sideways")),
    "an unknown cache": (2, "kv_cache = 'fp4': there are fp8, int8", quantize("--kv-cache", "fp4")),
    "a cache twice": (2, "attention inputs are already quantized", quantize("--kv-cache", "fp8")),
    "a stop at once": (2, "early_stop = 1.0", quantize("--early-stop", 1)),
    "samples in words": (2, "Invalid value", quantize("--nsamples", "many")),
    "one token": (2, "seqlen = 1", quantize("--seqlen", 1)),
    "published settings of nothing": (2, "rtn learns nothing", quantize("--paper-exact")),
    "two methods": (2, "--lr-plus means --method lrquant+", quantize("--lr-plus")),
    "a name that the hub has not": (2, "not a repository name", quantize("--push-to-hub", "a/b/c")),
    "an evaluation text that is not there": (2, "'no.txt' is neither a data set", quantize("--eval-ppl", "no.txt")),
    "statistics that are not there": (2, "not a file of channel statistics", quantize("--statistics", "/no/such")),
    # Other commands.
    "an unknown command": (2, "No such command", command("quantise")),
    "no model": (2, "Missing argument", command("quantize")),
    "info of nothing": (2, "no such folder", command("info", "TMP/none")),
    "info of a full model": (2, "not a compressed-tensors checkpoint", command("info", "TINY")),
    "a comparison of one": (2, "give at least two folders", command("compare", "TINY")),
    "a comparison of nothing": (2, "no such folder", command("compare", "TMP/a", "TMP/b")),
    "a report of nothing": (2, "no report data here", command("report", "TMP")),
    "a report into nothing": (
        2,
        "--output /no/such/x.html: its folder does not exist",
        command("report", "TINY", "--output", "/no/such/x.html"),
    ),
    "an export of nothing": (2, "no such folder", command("export", "TMP/none", "TMP/o", "--to", "gguf")),
    "an unknown export": (
        2,
        "unknown exporter 'onnx': there are gguf, dense",
        command("export", "TINY", "TMP/o", "--to", "onnx"),
    ),
    "an export in no dtype": (2, "dtype f8", command("export", "TINY", "TMP/o", "--to", "gguf", "--dtype", "f8")),
    "an export over a folder": (2, "already exists", command("export", "TINY", "TMP", "--to", "dense")),
    "an export into nothing": (2, "does not exist", command("export", "TINY", "TMP/no/such", "--to", "dense")),
    "eval of nothing": (2, "neither an existing folder", command("eval", "TMP/none", "--ppl", "zoo:pydoc")),
    "pictures for a text model": (2, "this model takes text", command("eval", "TINY", "--images", "zoo:shapes")),
    "an original without a text": (2, "nothing to measure", command("eval", "TINY", "--against", "TINY")),
    "windows of one token": (2, "Invalid value", command("eval", "TINY", "--ppl", "zoo:pydoc", "--seqlen", 1)),
    "an unknown device": (2, "device 'tpu9'", command("eval", "TINY", "--ppl", "zoo:pydoc", "--device", "tpu9")),
    "a benchmark of nothing": (2, "neither an existing folder", command("bench", "TMP/none")),
    "a benchmark in nothing": (2, "no program 'onnx'", command("bench", "TINY", "--in", "onnx")),
    "a demo of nothing": (2, "no demo for 'zoo:camel'", command("demo", "--model", "zoo:camel")),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, tiny: Path, tmp_path: Path) -> None:
    (tiny / "short.txt").write_text("Short.")
    code, says, make = CASES[name]
    arguments = make(tiny, tmp_path)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    done = lrquant(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    if "Usage:" not in done.stderr:  # typer's own errors come in a box
        assert len([line for line in done.stderr.splitlines() if "Error:" in line]) == 1
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
