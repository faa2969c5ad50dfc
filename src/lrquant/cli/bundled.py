"""The demo of each bundled model: its data, its measures, and a sample of its output."""

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrquant.report.run import Metric

Told = Callable[[int, int], None]  # (samples just done, of how many)
SEQLEN = 256
PROMPT = "The for statement is used to"


@dataclass(frozen=True)
class Show:
    """One bundled model. `measure` takes a model or its path, its processor, and the number of samples."""

    recipe: Mapping[str, Any]
    learning: Mapping[str, Any]  # of the methods that learn
    samples: str  # what the calibration samples are
    heldout: str  # what is measured on
    limit: int
    measure: "Callable[[Any, Any, int, Told], list[Metric]]"
    speak: Callable[[str], str] | None = None  # of a saved checkpoint, by plain transformers


def _perplexities(model: Any, tokenizer: Any, limit: int, told: Told) -> "list[Metric]":
    from lrquant.entrypoints.evaluate import evaluate
    from lrquant.report.run import Metric

    measured = evaluate(
        model, ("zoo:pydoc", "zoo:pycode"), SEQLEN, limit_windows=limit, tokenizer=tokenizer, callback=told
    )
    return [
        Metric(name=f"perplexity {name}", before=None, after=result.value, windows_after=list(result.window_losses))
        for name, result in measured.items()
    ]


def _accuracies(model: Any, processor: Any, limit: int, told: Told) -> "list[Metric]":
    from lrquant.entrypoints.evaluate import evaluate_images
    from lrquant.report.run import Metric

    result = evaluate_images(model, ["zoo:shapes"], limit, processor=processor, callback=told)["zoo:shapes"]
    return [
        Metric(name="top-1 %", before=None, after=100 * result.top1, better="higher"),
        Metric(name="top-5 %", before=None, after=100 * result.top5, better="higher"),
        Metric(name="loss", before=None, after=result.loss),
    ]


def _answers(model: Any, processor: Any, limit: int, told: Told) -> "list[Metric]":
    from lrquant.entrypoints.evaluate import evaluate_answers
    from lrquant.report.run import Metric

    result = evaluate_answers(model, ["zoo:shapes-vqa"], limit, processor=processor, callback=told)["zoo:shapes-vqa"]
    return [
        Metric(name="exact match %", before=None, after=100 * result.exact_match, better="higher"),
        Metric(name="answer perplexity", before=None, after=result.perplexity),
    ]


def _continue_text(path: str) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(io.StringIO()):  # compressed-tensors' progress bars
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        inputs = tokenizer(PROMPT, return_tensors="pt")
        ids = model.generate(  # type: ignore[misc]
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=32, do_sample=False
        )
    return f"continues:\n{tokenizer.decode(ids[0])}"


def _answer_a_question(path: str) -> str:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from lrquant.zoo.shapes import questions

    ((image, asked),) = questions(train=False, count=1)
    with redirect_stderr(io.StringIO()):  # compressed-tensors' progress bars
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype="float32")
        content = [{"type": "image"}, {"type": "text", "text": asked.question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=image, text=text, return_tensors="pt")
        model(**inputs)  # unpacks the vision tower, which `generate` asks before it calls the model
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)  # type: ignore[misc]
    said = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return f"about a held-out image: {asked.question}{said} (It is {asked.answer}.)"


_LANGUAGE = {"calibration": "zoo:pydoc", "nsamples": 32, "seqlen": SEQLEN}
_PICTURES = {"calibration": "zoo:shapes", "nsamples": 64}
_QUESTIONS = {"calibration": "zoo:shapes-vqa", "nsamples": 32, "towers": ("vision", "language")}

SHOWS: Mapping[str, Show] = MappingProxyType(
    {
        "zoo:llama": Show(
            _LANGUAGE,
            {"epochs": 5, "batch_size": 4},
            f"samples of {SEQLEN} tokens",
            f"windows of {SEQLEN} tokens of held-out text",
            64,
            _perplexities,
            _continue_text,
        ),
        "zoo:vit": Show(
            _PICTURES,
            {"epochs": 8, "batch_size": 16},
            "pictures",
            "held-out images of zoo:shapes",
            1000,
            _accuracies,
        ),
        "zoo:llava": Show(
            _QUESTIONS,
            {"epochs": 5, "batch_size": 4},
            "questions about pictures",
            "held-out questions of zoo:shapes-vqa",
            300,
            _answers,
            _answer_a_question,
        ),
    }
)
