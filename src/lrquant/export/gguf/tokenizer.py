"""A tokenizer.json as llama.cpp's vocabulary: tokens, their kinds, merges or scores, special tokens, chat template.

Two kinds of byte-pair encoding are held. Over bytes (GPT-2's kind), text is split by regular expressions that llama.cpp
has in its own code, under names: `SPLITS` says which name stands for which. Over characters with bytes as a fallback
(SentencePiece's kind), pieces are joined by scores, the best first: a piece's score is the negated rank of the first
merge that makes it, so the order of merges is the same.
"""

import json
import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lrquant.errors import UsageError
from lrquant.loading.pretrained import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SPACE = "▁"
_NEVER = -1e6  # the score of a piece that no merge makes

_GPT2 = "byte level"
_DIGITS = r"\p{N}"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K = _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# (how text is split, whether whole words in the vocabulary skip their merges) → llama.cpp's name.
SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_CL100K,), True): "llama-bpe",
    ((_CL100K,), False): "dbrx",
    ((_CL100K.replace("{1,3}", ""),), False): "qwen2",
    ((f"{_WORDS[0]}|{_WORDS[1]}|{_DIGITS}|{_REST}",), True): "tekken",
    ((f"{_WORDS[0]}{_SUFFIXES}?|{_WORDS[1]}{_SUFFIXES}?|{_DIGITS}{{1,3}}|{_REST}",), False): "gpt-4o",
}


def describe_tokenizer(writer: "GGUFWriter", folder: Path, rows: int) -> None:
    """Write the tokenizer that transformers loads from `folder`, for a model whose embedding has `rows` rows.

    What it loads is not always what tokenizer.json says: some families rebuild parts of it.

    Raises:
        UsageError: llama.cpp has no such kind.
        LrquantError: it cannot be loaded.
    """
    from gguf import SpecialVocab

    loaded = load_tokenizer(str(folder))
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise UsageError(f"{folder}: its tokenizer has no tokenizer.json, which the GGUF export needs")
    tokenizer = json.loads(loaded.backend_tokenizer.to_str())
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise UsageError(
            f"{folder}: a tokenizer of type {model.get('type')}; the GGUF export supports byte-pair encodings"
        )
    pieces = bool(model.get("byte_fallback"))
    tokens, types = _tokens(folder, tokenizer, rows)
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(model, tokens))
        writer.add_add_space_prefix(_prefixes_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(folder, tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    with TemporaryDirectory() as saved:  # SpecialVocab reads files
        loaded.save_pretrained(saved)
        shutil.copy(folder / "config.json", saved)
        special = SpecialVocab(saved, load_merges=not pieces, n_vocab=len(tokens))
    for kind in ("bos", "eos"):  # llama.cpp's defaults differ by the kind of tokenizer
        special.add_special_token.setdefault(kind, False)
    special.add_to_gguf(writer, quiet=True)
    other = [end for end in _ends(folder) if end != special.special_token_ids.get("eos")]
    if other and "eot" not in special.special_token_ids:
        writer.add_eot_token_id(other[0])


def _ends(folder: Path) -> list[int]:
    """The tokens at which generation stops."""
    try:
        values = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    ends = values.get("eos_token_id")
    return ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else []


def _tokens(folder: Path, tokenizer: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Every row's token and its kind; rows without one are named by their number."""
    from gguf import TokenType

    pieces = bool(tokenizer["model"].get("byte_fallback"))
    tokens, types = [f"[PAD{row}]" for row in range(rows)], [int(TokenType.UNUSED)] * rows
    added = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    vocabulary = dict(tokenizer["model"]["vocab"])
    most = max([*vocabulary.values(), *added])
    if most >= rows:
        raise UsageError(f"{folder}: the tokenizer has {most + 1} tokens, the model's embedding {rows}")
    for text, number in vocabulary.items():
        tokens[number] = text
        is_byte = pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        types[number] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    unknown = vocabulary.get(tokenizer["model"].get("unk_token"))
    for number, token in added.items():
        text = token["content"]
        tokens[number] = text if token["special"] else text.replace(_SPACE, " ")
        types[number] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    if pieces and unknown is not None:
        types[unknown] = int(TokenType.UNKNOWN)
    return tokens, types


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    return [-float(ranks[token]) if token in ranks else _NEVER for token in tokens]


def _prefixes_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a text is tokenized as if a space stood before it."""
    for part in _parts(tokenizer.get("normalizer"), "normalizers"):
        if part["type"] == "Prepend":
            return True
    for part in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "Metaspace":
            return bool(part.get("prepend_scheme", "always") != "never")
    return False


def _split_name(folder: Path, tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how this tokenizer splits text before merging."""
    steps: list[str] = []
    for part in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
            steps += [_GPT2] if part.get("use_regex", True) else []
        elif part["type"] == "Digits" and part.get("individual_digits"):
            steps.append(_DIGITS)
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and "Regex" in part["pattern"]:
            steps.append(part["pattern"]["Regex"])
        else:
            steps.append(part["type"])
    whole = bool(tokenizer["model"].get("ignore_merges"))
    name = SPLITS.get((tuple(steps), whole))
    if name is None:
        raise UsageError(
            f"{folder}: a tokenizer that splits text by {' and '.join(steps)}: llama.cpp's name for it is unknown"
        )
    return name


def _parts(step: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if step is None:
        return []
    return list(step[inside]) if step["type"] == "Sequence" else [step]
