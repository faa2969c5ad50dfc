"""Models and tokenizers by name: a hub name, a local folder, or `zoo:NAME`; every failure is one line."""

import io
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from lrquant.errors import LrquantError, UsageError
from lrquant.loading.auto_class import Modality, auto_model
from lrquant.loading.quantized_source import dequantizing
from lrquant.loading.source_tensors import say_untied
from lrquant.loading.validation import check_folder
from lrquant.runtime import distributed
from lrquant.zoo import ZOO_PREFIX, zoo_model_path

_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "spiece*", "*.tiktoken", "tekken*", "*tokenization*")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(name: str) -> str:
    """The local folder or hub name that `name` stands for.

    Raises:
        UsageError: `name` is no zoo model, no folder with a `config.json`, and cannot be a hub name.
    """
    if name.startswith(ZOO_PREFIX):
        return str(zoo_model_path(name))
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{name}: this folder has no config.json, so it is not a model")
        return name
    if path.exists():
        raise UsageError(f"{name}: a model is a folder, not a file")
    if not _HUB_NAME.fullmatch(name):
        raise UsageError(f"{name!r} is neither an existing folder nor the name of a model on the hub")
    return name


def fetched_folder(name: str) -> Path | None:
    """The folder with the model's files, fetched from the hub if need be; None: it has no safetensors there."""
    path = Path(resolve_model(name))
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        # Some authors add the same weights in other layouts.
        path = Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors"], ignore_patterns=["consolidated*", "*/*"]
            )
        )
    return path if list(path.glob("model*.safetensors")) else None


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """`auto` computes in float32 on CPUs and in bfloat16 on accelerators."""
    if choice == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[choice]


def pick_device(choice: str) -> torch.device:
    """`auto` takes the accelerator when there is one; of several processes on a machine each takes its own GPU.

    Raises:
        UsageError: no such device here.
    """
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if choice in ("auto", "cuda") and found.type == "cuda" and distributed.launched():
        mine = distributed.local_rank()
        if mine >= torch.cuda.device_count():
            raise UsageError(
                f"{torch.cuda.device_count()} GPUs for {distributed.local_world()} processes on this machine: "
                f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(mine)
        return torch.device("cuda", mine)
    if choice == "auto":
        return found
    try:
        device = torch.device(choice)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {choice!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """The model's transformers configuration; of a local folder, once it is known to go with its weights."""
    from transformers import AutoConfig

    path = Path(resolve_model(name))
    if path.is_dir():
        check_folder(path, trust_remote_code)
    return _from_pretrained(AutoConfig, name, trust_remote_code=trust_remote_code)


def stored_dtype(name: str, trust_remote_code: bool = False) -> torch.dtype:
    """The floating-point format that a checkpoint is written in."""
    dtype = load_config(name, trust_remote_code).dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.bfloat16


def load_model(name: str, dtype: torch.dtype, trust_remote_code: bool = False, *, original: bool = False) -> Any:
    """The model in `dtype`, on the CPU, in evaluation mode, with the head that its checkpoint has and every weight.

    `original`: in floating point; a source in fp8 and the like is dequantized.

    Raises:
        UsageError: an `original` is quantized so that it cannot be.
        LrquantError: a shard is missing or damaged, or a weight is missing from them.
    """
    config = load_config(name, trust_remote_code)
    undone = dequantizing(config, name) if original else None
    model, loading = _from_pretrained(
        auto_model(config),
        name,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
        **({} if undone is None else {"quantization_config": undone}),
    )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise LrquantError(f"{name}: the checkpoint lacks {len(missing)} weights, among them {missing[0]}")
    say_untied(model)
    return model.eval()


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model by name or folder."""
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)


def load_processor(name: str, modality: Modality, trust_remote_code: bool = False) -> Any:
    """What prepares a model's inputs: its tokenizer, its image processor, or both in one."""
    import transformers

    auto = {
        "text": "AutoTokenizer",
        "sentences": "AutoTokenizer",
        "image": "AutoImageProcessor",
        "image+text": "AutoProcessor",
    }[modality]
    path = Path(resolve_model(name))
    if auto == "AutoTokenizer" and path.is_dir() and not any(any(path.glob(files)) for files in _TOKENIZER_FILES):
        raise LrquantError(f"{name}: has no tokenizer; copy its files from the base model")
    return _from_pretrained(getattr(transformers, auto), name, trust_remote_code=trust_remote_code)


def _from_pretrained(auto: Any, name: str, **options: Any) -> Any:
    from safetensors import SafetensorError

    path = resolve_model(name)
    try:
        # compressed-tensors' progress bars cannot be turned off
        with distributed.apart(), redirect_stderr(io.StringIO()):
            return auto.from_pretrained(path, **options)
    except SafetensorError as error:
        raise LrquantError(f"{name}: a weight file is damaged ({first_line(error)}); fetch it again") from error
    except OSError as error:
        if not Path(path).is_dir():
            raise UsageError(
                f"{name!r} is not a local folder, and the hub has no such model or cannot be reached"
            ) from error
        raise cannot_load(name, error) from error
    except Exception as error:  # a stranger's files reach everything underneath
        if "trust_remote_code" in str(error):
            ask = "the model needs its own code; --trust-remote-code allows it to run"
            raise LrquantError(f"{name}: cannot be loaded ({ask})") from error
        raise cannot_load(name, error) from error


def cannot_load(name: str, error: BaseException) -> LrquantError:
    """An error of a library about a model's files, as one line of limited length."""
    return LrquantError(f"{name}: cannot be loaded ({first_line(error)})")


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's text, shortened to `most` characters."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, KeyError) or not line:
        line = f"{type(error).__name__} {line}".strip()
    return line if len(line) <= most else f"{line[:most]}…"


def window(config: Any, seqlen: int | None) -> int:
    """Tokens per sample: `seqlen`, or 2048, but no more than the model's positions.

    Raises:
        UsageError: `seqlen` is more than the model's positions.
    """
    most = getattr(config, "max_position_embeddings", None)
    if seqlen is None:
        return min(2048, most or 2048)
    if most and seqlen > most:
        raise UsageError(f"seqlen {seqlen} is longer than the model's {most} positions")
    return seqlen
