"""Text by name: hub data sets, local files and folders, and the zoo's offline sets; cut into token windows."""

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrquant.errors import LrquantError, UsageError
from lrquant.loading.offline import cache_if_unreachable
from lrquant.zoo import corpus

ZOO = "zoo:"
TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class HubText:
    """Where a named set lives on the hub, and its parts for calibration and evaluation."""

    path: str
    column: str
    train: dict[str, Any]
    test: dict[str, Any]
    separator: str
    test_documents: int | None = None  # evaluate on the first so many


_PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{}/*.parquet"

HUB_TEXTS = {
    "wikitext2": HubText(
        "Salesforce/wikitext",
        "text",
        {"name": "wikitext-2-raw-v1", "split": "train"},
        {"name": "wikitext-2-raw-v1", "split": "test"},
        "\n\n",
    ),
    "ptb": HubText(
        "parquet",
        "sentence",
        {"data_files": {"train": _PTB.format("train")}, "split": "train"},
        {"data_files": {"train": _PTB.format("test")}, "split": "train"},
        " ",
    ),
    "c4": HubText(
        "allenai/c4",
        "text",
        {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"},
        {"data_files": {"train": "en/c4-validation.00000-of-00008.json.gz"}, "split": "train"},
        " ",
        test_documents=1100,
    ),
}

ZOO_TEXTS = ("pydoc", "pycode")


def text_name(source: str) -> str:
    """What results are keyed by: the data set's name, or the file's or folder's own name."""
    return source if source.startswith(ZOO) or source in HUB_TEXTS else Path(source).name


def read_text(source: str, train: bool) -> list[str]:
    """Documents of `source`: a hub name, `zoo:pydoc`, `zoo:pycode`, a text file or a folder of them.

    Named sets have a part for calibration (`train`) and one for evaluation; a file is used whole.

    Raises:
        UsageError: there is no such source, or it holds no text.
        LrquantError: the hub cannot be reached.
    """
    if source.startswith(ZOO):
        name = source.removeprefix(ZOO)
        if name not in ZOO_TEXTS:
            raise UsageError(f"unknown data set {source!r}: the zoo has {', '.join(ZOO + text for text in ZOO_TEXTS)}")
        documents = list(corpus.documents(name, "train" if train else "heldout"))
    elif source in HUB_TEXTS:
        documents = _read_hub(source, train)
    else:
        documents = _read_local(Path(source))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UsageError(f"{source}: there is no text in it")
    return documents


def _read_hub(name: str, train: bool) -> list[str]:
    from datasets import load_dataset

    text = HUB_TEXTS[name]
    try:
        with cache_if_unreachable():
            rows = load_dataset(text.path, **(text.train if train else text.test))
    except Exception as error:  # the libraries underneath raise a dozen kinds when the hub is away
        raise LrquantError(
            f"data set {name!r} cannot be fetched from the hub ({type(error).__name__}); give a local file "
            f"or folder of text, or zoo:pydoc"
        ) from error
    if not train and text.test_documents:
        rows = rows.select(range(min(text.test_documents, len(rows))))
    documents = rows[text.column]
    return list(documents) if name == "c4" and train else [text.separator.join(documents)]


def _read_local(path: Path) -> list[str]:
    if not path.exists():
        names = ", ".join([*HUB_TEXTS, *(ZOO + name for name in ZOO_TEXTS)])
        raise UsageError(f"{str(path)!r} is neither a data set ({names}) nor an existing file or folder")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        if not files:
            raise UsageError(f"{path}: no {', '.join(TEXT_SUFFIXES)} file in this folder")
        return [document for file in files for document in _read_local(file)]
    if path.suffix not in TEXT_SUFFIXES:
        raise UsageError(f"{path}: text is read from {', '.join(TEXT_SUFFIXES)} files, not {path.suffix or 'this'}")
    try:
        return [path.read_text(encoding="utf-8")] if path.suffix == ".txt" else _read_table(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text ({error})") from None


def _read_table(path: Path) -> list[str]:
    """The `text` column, or the only column of strings, of a JSON-lines or parquet file."""
    from datasets import Value, load_dataset
    from datasets.exceptions import DatasetGenerationError

    kind = "parquet" if path.suffix == ".parquet" else "json"
    if path.stat().st_size == 0:
        return []
    try:
        rows = load_dataset(kind, data_files=glob.escape(os.fspath(path)), split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise UsageError(f"{path}: not a readable {kind} file ({str(error).splitlines()[0]})") from None
    texts = (Value("string"), Value("large_string"), Value("string_view"))
    strings = [name for name, kind_of in rows.features.items() if kind_of in texts]
    column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
    if column is None:
        raise UsageError(f"{path}: needs a column named 'text' (string columns: {', '.join(strings) or 'none'})")
    return [text for text in rows[column] if text]


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids of one text, (tokens,)."""
    return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]


def calibration_samples(
    tokenizer: Any, source: str, nsamples: int, seqlen: int, seed: int, read: Callable[..., list[str]] = read_text
) -> list[Tensor]:
    """`nsamples` windows of `seqlen` tokens, (1, seqlen) each, that do not overlap, drawn by `seed`.

    Raises:
        UsageError: the text holds fewer than nsamples × seqlen tokens.
    """
    documents = read(source, train=True)
    generator = torch.Generator().manual_seed(seed)
    needed = nsamples * seqlen
    if len(documents) > 10_000:  # a web-sized set: enough of it, in a seeded order
        documents = _draw_documents(documents, needed * 16, generator)
    ids = tokenize(tokenizer, "\n\n".join(documents))
    if len(ids) < needed:
        raise UsageError(
            f"{source}: {len(ids)} tokens are too few for {nsamples} samples of {seqlen} ({needed}); "
            f"at most {len(ids) // seqlen} samples fit, or use a shorter seqlen"
        )
    spare = len(ids) % seqlen
    start = int(torch.randint(spare + 1, (1,), generator=generator))
    rows = ids[start : start + len(ids) // seqlen * seqlen].view(-1, seqlen)
    return list(rows[torch.randperm(len(rows), generator=generator)[:nsamples]].unsqueeze(1))


def _draw_documents(documents: Sequence[str], characters: int, generator: torch.Generator) -> list[str]:
    drawn: list[str] = []
    total = 0
    for index in torch.randperm(len(documents), generator=generator).tolist():
        drawn.append(documents[index])
        total += len(documents[index])
        if total >= characters:
            break
    return drawn


def evaluation_ids(tokenizer: Any, source: str) -> Tensor:
    """Token ids of the evaluation text, joined, (tokens,)."""
    return tokenize(tokenizer, "\n\n".join(read_text(source, train=False)))
