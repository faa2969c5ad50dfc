"""Quality of a multimodal model's answers to short questions about images."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lrquant.calibration.dialogues import Dialogue, dialogue_inputs, prompt
from lrquant.errors import UsageError

MOST_NEW_TOKENS = 32


@dataclass(frozen=True)
class AnswerQuality:
    """Share of generated answers that equal the reference, and perplexity of the references' tokens."""

    exact_match: float
    perplexity: float
    questions: int


def normalized(answer: str) -> str:
    """Lower case, single spaces, no final full stop."""
    return re.sub(r"\s+", " ", answer).strip().rstrip(".").strip().lower()


@torch.no_grad()
def answer_quality(
    model: Any,
    processor: Any,
    chosen: Sequence[Dialogue],
    told: Callable[[int, int], None] = lambda done, total: None,
) -> AnswerQuality:
    """Exact match of greedy answers, and exp of the mean negative log-likelihood of the reference's tokens.

    Raises:
        UsageError: a dialogue has no reference answer.
    """
    right, tokens, likelihood = 0, 0, 0.0
    for dialogue in chosen:
        if dialogue.answer is None:
            raise UsageError(
                "a question has no reference answer; give answer, or end the conversation with the assistant's turn"
            )
        image = dialogue.load()
        question = prompt(processor, dialogue.turns[:-1], answer_next=True)
        inputs = _moved(dialogue_inputs(processor, image, question), model)
        asked = inputs["input_ids"].shape[1]
        whole = _moved(dialogue_inputs(processor, image, prompt(processor, dialogue.turns, answer_next=False)), model)
        logits = model(**whole, use_cache=False).logits[0, asked - 1 : -1].float()
        reference = whole["input_ids"][0, asked:]
        likelihood += float(torch.nn.functional.cross_entropy(logits, reference, reduction="sum"))
        tokens += len(reference)
        # Where every token of the reference is the likeliest, greedy generation is the reference.
        if bool((logits.argmax(-1) == reference).all()):
            right += 1
        else:
            ids = model.generate(**inputs, max_new_tokens=MOST_NEW_TOKENS, do_sample=False)
            answer = processor.tokenizer.decode(ids[0, asked:], skip_special_tokens=True)
            right += normalized(answer) == normalized(dialogue.answer)
        told(1, len(chosen))
    mean = likelihood / tokens
    return AnswerQuality(right / len(chosen), math.exp(mean) if mean < 700 else math.inf, len(chosen))


def _moved(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Inputs on the model's device, pictures in its precision."""
    device = next(model.parameters()).device
    return {
        name: value.to(device, model.dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
    }
