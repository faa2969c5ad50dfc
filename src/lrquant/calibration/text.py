"""Text by name: hub data sets, local files and folders, and the zoo's offline sets; cut into token windows.

Many models are trained on texts that begin with a special token (BOS), and some need it. If the tokenizer adds it,
every window begins with it, both in calibration and in evaluation: `leading_token`.
"""

import codecs
import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lrquant.calibration.conversations import KINDS, has_conversations, rendered
from lrquant.calibration.token_cache import remembered
from lrquant.errors import LrquantError, UsageError
from lrquant.loading.offline import cache_if_unreachable
from lrquant.runtime.paths import read_regular
from lrquant.zoo import corpus

ZOO = "zoo:"
TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
MOST_TEXT = 4 << 30  # bytes of a text file
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True)
class HubText:
    """A named data set on the hub, and its parts for calibration and evaluation."""

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
    """The key of results: the name of the data set, file or folder."""
    return source if source.startswith(ZOO) or source in HUB_TEXTS else Path(source).name


def check_source(source: str) -> None:
    """Raise early unless `source` names a data set, or a file or folder that exists.

    Raises:
        UsageError: it names the data sets that there are.
    """
    if source.startswith(ZOO):
        if source.removeprefix(ZOO) not in ZOO_TEXTS:
            raise UsageError(f"unknown data set {source!r}: the zoo has {', '.join(ZOO + text for text in ZOO_TEXTS)}")
    elif source not in HUB_TEXTS and not Path(source).exists():
        names = ", ".join([*HUB_TEXTS, *(ZOO + name for name in ZOO_TEXTS)])
        raise UsageError(f"{source!r} is neither a data set ({names}) nor an existing file or folder")


def check_sources(sources: Sequence[str]) -> None:
    """`check_source` of all of them."""
    for source in sources:
        check_source(source)


def read_text(source: str, train: bool, tokenizer: Any = None) -> list[str]:
    """Documents of `source`: a hub name, `zoo:pydoc`, `zoo:pycode`, a text file or a folder of them.

    Named sets have one part for calibration (`train`) and one for evaluation; of a file, all text is used for both.
    Conversations are rendered by the chat template of `tokenizer`.

    Raises:
        UsageError: there is no such source, or it holds no text.
        LrquantError: the hub cannot be reached.
    """
    check_source(source)
    if source.startswith(ZOO):
        documents = list(corpus.documents(source.removeprefix(ZOO), "train" if train else "heldout"))
    elif source in HUB_TEXTS:
        documents = _read_hub(source, train)
    else:
        documents = _read_local(Path(source), tokenizer)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UsageError(f"{source}: it contains no text")
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


def _read_local(path: Path, tokenizer: Any) -> list[str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
        if not files:
            raise UsageError(f"{path}: no {', '.join(TEXT_SUFFIXES)} file in this folder")
        return [document for file in files for document in _read_local(file, tokenizer)]
    suffix = path.suffix.lower()
    if suffix not in TEXT_SUFFIXES:
        raise UsageError(f"{path}: text is read from {', '.join(TEXT_SUFFIXES)} files, not {path.suffix or 'this'}")
    if not path.is_file():
        raise UsageError(f"{path}: not a regular file")
    try:
        return [_decoded(read_regular(path, MOST_TEXT))] if suffix == ".txt" else _read_table(path, tokenizer)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as text ({error})") from None


def _decoded(content: bytes) -> str:
    """Text in UTF-8, or in UTF-16 with a byte-order mark."""
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    return content.decode(encoding)


def _read_table(path: Path, tokenizer: Any) -> list[str]:
    """Conversations, the `text` column, or the only column of strings, of a JSON-lines or parquet file."""
    from datasets import Value, load_dataset
    from datasets.exceptions import DatasetGenerationError

    kind = "parquet" if path.suffix.lower() == ".parquet" else "json"
    if path.stat().st_size == 0:
        return []
    try:
        rows = load_dataset(kind, data_files=glob.escape(os.fspath(path)), split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise UsageError(f"{path}: not a readable {kind} file ({str(error).splitlines()[0]})") from None
    texts = (Value("string"), Value("large_string"), Value("string_view"))
    strings = [name for name, kind_of in rows.features.items() if kind_of in texts]
    column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
    if "text" not in strings and has_conversations(rows.features):
        return [rendered(row, tokenizer, str(path)) for row in rows]
    if column is None:
        raise UsageError(
            f"{path}: needs a column named 'text', or conversations ({KINDS}); "
            f"string columns: {', '.join(strings) or 'none'}"
        )
    return [text for text in rows[column] if text]


Bos = Literal["auto", "on", "off"]


def leading_token(tokenizer: Any, bos: Bos) -> int | None:
    """The token that every window begins with: `auto`, the BOS token if the tokenizer adds it to a text by itself.

    Published results were measured with `off`: such a tokenizer then adds it only before the first window.

    Raises:
        UsageError: `on`, and there is no such token.
    """
    token: int | None = getattr(tokenizer, "bos_token_id", None)
    if bos == "on" and token is None:
        raise UsageError("bos 'on': this model's tokenizer has no BOS token")
    if bos == "off" or token is None:
        return None
    adds = tokenizer("a")["input_ids"][:1] == [token] != tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    return token if bos == "on" or adds else None


def tokenize(tokenizer: Any, text: str, special: bool = True) -> Tensor:
    """Token ids of one text, (tokens,); without `special`, none of those that the tokenizer adds."""
    added = {} if special else {"add_special_tokens": False}

    def fresh() -> Tensor:
        ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False, **added)["input_ids"][0]
        return ids

    return remembered(tokenizer, text, special=special, tokenize=fresh)


def check_vocabulary(ids: Tensor, rows: int) -> None:
    """Raise unless the embedding, which has so many `rows`, has one for every token of `ids`.

    Raises:
        UsageError: the tokenizer is another model's.
    """
    if ids.numel() and int(ids.max()) >= rows:
        raise UsageError(
            f"the tokenizer gives token {int(ids.max())}, but the model has {rows} embeddings: "
            "this is not the model's tokenizer"
        )


def windows(ids: Tensor, seqlen: int, lead: int | None = None) -> Tensor:
    """`ids` cut into windows that do not overlap, (windows, seqlen), each behind the token `lead` where there is one.

    A last, shorter piece is left out.
    """
    step = seqlen - (lead is not None)
    rows = ids[: len(ids) // step * step].view(-1, step)
    return rows if lead is None else torch.cat([torch.full_like(rows[:, :1], lead), rows], dim=1)


def calibration_samples(
    tokenizer: Any,
    source: str,
    nsamples: int,
    seqlen: int,
    seed: int,
    *,
    read: Callable[..., list[str]] | None = None,
    bos: Bos = "off",
) -> list[Tensor]:
    """`nsamples` windows of `seqlen` tokens, (1, seqlen) each, that do not overlap, drawn by `seed`.

    Raises:
        UsageError: the text holds fewer than nsamples × seqlen tokens.
    """
    documents = read(source, train=True) if read else read_text(source, train=True, tokenizer=tokenizer)
    lead = leading_token(tokenizer, bos)
    step = seqlen - (lead is not None)
    generator = torch.Generator().manual_seed(seed)
    needed = nsamples * step
    if len(documents) > 10_000:  # a web-sized set: enough of it, in a seeded order
        documents = _draw_documents(documents, needed * 16, generator)
    ids = tokenize(tokenizer, "\n\n".join(documents), special=lead is None)
    if len(ids) < needed:
        raise UsageError(
            f"{source}: {len(ids)} tokens are not enough for {nsamples} samples of {seqlen} ({needed}); "
            f"at most {len(ids) // step} samples fit, or use a shorter seqlen"
        )
    start = int(torch.randint(len(ids) % step + 1, (1,), generator=generator))
    rows = windows(ids[start:], seqlen, lead)
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


def evaluation_ids(tokenizer: Any, source: str, bos: Bos = "off") -> Tensor:
    """Token ids of the evaluation text, joined, (tokens,); without BOS where windows will begin with it."""
    text = "\n\n".join(read_text(source, train=False, tokenizer=tokenizer))
    return tokenize(tokenizer, text, special=leading_token(tokenizer, bos) is None)
