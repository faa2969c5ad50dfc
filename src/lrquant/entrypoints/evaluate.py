"""Measuring models: `evaluate` on text, `evaluate_images` and `evaluate_answers` on images."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from lrquant.calibration.dialogues import dialogues
from lrquant.calibration.images import pictures
from lrquant.calibration.sentences import sentences
from lrquant.calibration.text import Bos, evaluation_ids, leading_token, read_text, text_name
from lrquant.errors import UsageError
from lrquant.evaluation import (
    Agreement,
    AnswerQuality,
    ImageAccuracy,
    Perplexity,
    agreement,
    answer_quality,
    image_accuracy,
    perplexity,
)
from lrquant.evaluation.embeddings import EmbeddingQuality, compare_embeddings, embed
from lrquant.evaluation.masked import masked_perplexity
from lrquant.evaluation.perplexity import windows_of
from lrquant.loading.auto_class import Modality, fills_in_masks, modality_of
from lrquant.loading.checkpoint import load
from lrquant.loading.pretrained import compute_dtype, load_processor, pick_device, window
from lrquant.runtime.distributed import join
from lrquant.runtime.profile import timed

SENTENCES = 200  # that are compared unless a limit is given
PICTURES = 1000  # that are looked at unless a limit is given


class Measuring(TypedDict, total=False):
    """Options of all functions that measure a model.

    device: `auto` (an accelerator if there is one), `cpu`, `cuda:1`, …
    dtype: `auto` (float32 on CPUs, else bfloat16), `float32` or `bfloat16`; of a model by name.
    bos: `auto` (every window of text begins with the BOS token, if the tokenizer adds it to a text) or `off`, as in
        published results.
    trust_remote_code: whether code that comes with the model may run; False unless given.
    callback: is called with (number done just now, total) as the measurement progresses.
    """

    device: str
    dtype: str
    bos: Bos
    trust_remote_code: bool
    callback: Callable[[int, int], None]


@timed("evaluate")
def evaluate(
    model_or_path: Any,
    texts: Sequence[str],
    seqlen: int | None = None,
    *,
    limit_windows: int | None = None,
    tokenizer: Any = None,
    **how: Unpack[Measuring],
) -> dict[str, Perplexity]:
    """Perplexity of a model on each of `texts`, keyed by the set's or the file's name.

    The text is cut into non-overlapping windows of `seqlen` tokens (2048, or as many as the model takes):

        perplexity = exp of the mean over windows of −log p(token | those before it), over seqlen − 1 predictions each

    A checkpoint written by lrquant is evaluated with everything quantized, including attention inputs. Under
    `torchrun`, every rank makes the same call and evaluates its share of the windows; all ranks receive the results.

    Args:
        model_or_path: a name or folder, or a model in memory, with its `tokenizer`.
        limit_windows: the largest number of windows of each text, from its start.
        how: `Measuring`.

    Raises:
        UsageError: the model does not take text, or a text cannot be found.
    """
    with _ready(model_or_path, tokenizer, how) as ready:
        if ready.processor is None:
            raise UsageError("a model in memory needs its tokenizer to be evaluated on text")
        if modality_of(ready.model) == "image":
            raise UsageError("this model takes image, not text: it has no perplexity")
        tokenizer = getattr(ready.processor, "tokenizer", ready.processor)  # part of a multimodal model's processor
        seqlen = window(ready.model.config.get_text_config(), seqlen)
        if modality_of(ready.model) == "sentences":
            return _masked(ready, texts, seqlen, limit=limit_windows)
        bos = how.get("bos", "auto")
        lead = leading_token(tokenizer, bos)
        ids = {text_name(text): evaluation_ids(tokenizer, text, bos) for text in texts}
        ready.to_device()
        ranks = join(ready.device)
        return {
            name: perplexity(ready.model, tokens, seqlen, limit_windows, told=ready.callback, ranks=ranks, lead=lead)
            for name, tokens in ids.items()
        }


def _masked(ready: "_Ready", texts: Sequence[str], seqlen: int, *, limit: int | None) -> dict[str, Perplexity]:
    """Perplexity of masked tokens, where the model has a head for them."""
    if not fills_in_masks(ready.model):
        raise UsageError(
            f"{type(ready.model).__name__} predicts no tokens, so it has no perplexity; compare its embeddings "
            f"with the original's (lrquant.entrypoints.evaluate.evaluate_embeddings)"
        )
    ready.to_device()
    tokenizer = ready.processor
    return {
        text_name(text): masked_perplexity(
            ready.model,
            tokenizer,
            torch.tensor(tokenizer("\n\n".join(read_text(text, train=False)), add_special_tokens=False)["input_ids"]),
            seqlen=seqlen,
            limit_windows=limit,
            told=ready.callback,
        )
        for text in texts
    }


def evaluate_embeddings(
    model_or_path: Any,
    original: Any,
    sources: Sequence[str],
    *,
    limit: int | None = None,
    tokenizer: Any = None,
    **how: Unpack[Measuring],
) -> dict[str, EmbeddingQuality]:
    """Compare a model's sentence embeddings, means of last hidden states, with those of its `original`.

    They are measured on up to `limit` paragraphs (200) of each of `sources`, which are texts as in `evaluate`; `how` is
    as there, too.

    Raises:
        UsageError: one of the models is not a text encoder, or a text cannot be found.
    """
    chosen = {source: sentences(source, limit or SENTENCES) for source in sources}
    found: list[dict[str, torch.Tensor]] = []
    for each in (model_or_path, original):
        with _ready(each, tokenizer, how) as ready:
            ready.check("sentences")
            seqlen = window(ready.model.config, None)
            embedded = {name: embed(*ready.pair, texts, seqlen=seqlen) for name, texts in chosen.items()}
            found.append(embedded)
    return {source: compare_embeddings(found[0][source], found[1][source]) for source in sources}


def compare_predictions(
    model_or_path: Any,
    original: Any,
    texts: Sequence[str],
    *,
    seqlen: int | None = None,
    limit_windows: int | None = None,
    tokenizer: Any = None,
    **how: Unpack[Measuring],
) -> dict[str, Agreement]:
    """KL divergence between a model's predictions and those of its `original`, and how often the top tokens agree.

    Windows and arguments are as in `evaluate`. Both models are in memory at the same time.

    Raises:
        UsageError: a model does not take text, a text cannot be found, or the vocabularies differ.
    """
    with _ready(model_or_path, tokenizer, how) as ready, _ready(original, tokenizer, how) as other:
        if ready.processor is None:
            raise UsageError("a model in memory needs its tokenizer to be evaluated on text")
        if "image" in (modality_of(ready.model), modality_of(other.model)):
            raise UsageError("this model takes image, not text: it predicts no tokens")
        tokenizer = getattr(ready.processor, "tokenizer", ready.processor)
        seqlen, bos = window(ready.model.config.get_text_config(), seqlen), how.get("bos", "auto")
        lead = leading_token(tokenizer, bos)
        ids = {text_name(text): evaluation_ids(tokenizer, text, bos) for text in texts}
        ready.to_device()
        other.to_device()
        ranks = join(ready.device)
        return {
            name: agreement(
                ready.model,
                other.model,
                windows_of(tokens, seqlen, limit_windows, lead=lead),
                told=ready.callback,
                ranks=ranks,
            )
            for name, tokens in ids.items()
        }


def evaluate_images(
    model_or_path: Any,
    sources: Sequence[str],
    limit: int | None = None,
    *,
    processor: Any = None,
    **how: Unpack[Measuring],
) -> dict[str, ImageAccuracy]:
    """Top-1 and top-5 accuracy of an image classifier on each of `sources`.

    A source is a folder with one subfolder per class, a data set on the hub, or `zoo:shapes`. At most `limit` images of
    each are used (1000). `how` is as in `evaluate`.

    Raises:
        UsageError: the model does not take images, or a source cannot be found.
    """
    chosen = partial(pictures, train=False, limit=limit or PICTURES)
    with _ready(model_or_path, processor, how) as ready:
        ready.check("image")
        return {source: image_accuracy(*ready.pair, chosen(source), told=ready.callback) for source in sources}


def evaluate_answers(
    model_or_path: Any,
    sources: Sequence[str],
    limit: int | None = None,
    *,
    processor: Any = None,
    **how: Unpack[Measuring],
) -> dict[str, AnswerQuality]:
    """Exact match and answer perplexity of a multimodal model on each of `sources`.

    A source is `zoo:shapes-vqa`, or a .jsonl file of questions with answers. At most `limit` questions of each are used
    (all of a file). `how` is as in `evaluate`.

    Raises:
        UsageError: the model does not take images with text, or a source cannot be found.
    """
    chosen = partial(dialogues, train=False, limit=limit)
    with _ready(model_or_path, processor, how) as ready:
        ready.check("image+text")
        return {source: answer_quality(*ready.pair, chosen(source), told=ready.callback) for source in sources}


@dataclass(frozen=True)
class _Ready:
    """A model to be measured, what prepares its inputs, and where that happens."""

    model: Any
    processor: Any
    device: torch.device
    callback: Callable[[int, int], None]

    def to_device(self) -> None:
        self.model.to(self.device)

    @property
    def pair(self) -> tuple[Any, Any]:
        return self.model, self.processor

    def check(self, wanted: Modality) -> None:
        """Move to the device, once it is known that the model takes `wanted`."""
        found = modality_of(self.model)
        if found != wanted:
            raise UsageError(f"this model takes {found}, not {wanted}")
        if self.processor is None:
            raise UsageError("a model in memory needs its tokenizer or processor")
        self.to_device()


@contextmanager
def _ready(model_or_path: Any, processor: Any, how: Measuring) -> Iterator[_Ready]:
    """The model, loaded if it is named, with its processor; afterwards it is where it was."""
    unknown = how.keys() - Measuring.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown argument {min(unknown)!r}: there are {', '.join(Measuring.__annotations__)}")
    device, trust = pick_device(how.get("device", "auto")), how.get("trust_remote_code", False)
    model = model_or_path
    if isinstance(model_or_path, str | Path):
        model = load(str(model_or_path), compute_dtype(how.get("dtype", "auto"), device), trust)
        processor = processor or load_processor(str(model_or_path), modality_of(model), trust)
    home = next(model.parameters()).device
    try:
        yield _Ready(model, processor, device, how.get("callback", lambda done, total: None))
    finally:
        model.to(home)
