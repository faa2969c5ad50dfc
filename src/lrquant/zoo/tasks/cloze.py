"""The items of `zoo:cloze`: a passage of held-out documentation, and four ways in which it might go on.

One is the passage's own next words, three are the next words of other passages. Which passages, which
distractors and which place the answer has follow from the text alone, so every run asks the same questions
of the same interpreter's documentation. Chance is one in four.
"""

import random
from typing import Any

from lrquant.zoo.corpus import documents

CONTEXT_WORDS = 36
ANSWER_WORDS = 4
CHOICES = 4
ITEMS = 400


def passages() -> list[tuple[str, str]]:
    """(context, continuation) all along the held-out documents, in their order; continuations are made of words."""
    length = CONTEXT_WORDS + ANSWER_WORDS
    found = []
    for document in documents("pydoc", "heldout"):
        words = document.split()
        for start in range(0, len(words) - length + 1, length):
            continuation = words[start + CONTEXT_WORDS : start + length]
            if all(word.strip(".,:;()").isalpha() for word in continuation):
                found.append((" ".join(words[start : start + CONTEXT_WORDS]), " ".join(continuation)))
    return found


def items() -> list[dict[str, Any]]:
    """`context`, `choices` and the index of the right one, `answer`; at most `ITEMS`, spread evenly over the text."""
    everything = passages()
    step = max(1.0, len(everything) / ITEMS)
    chosen = [everything[int(index * step)] for index in range(min(ITEMS, len(everything)))]
    draw = random.Random(0)
    result = []
    for context, continuation in chosen:
        others = sorted({other for _, other in everything} - {continuation})
        choices = [continuation, *draw.sample(others, CHOICES - 1)]
        draw.shuffle(choices)
        result.append({"context": context, "choices": choices, "answer": choices.index(continuation)})
    return result


def dataset(**_: Any) -> dict[str, Any]:
    """As lm-eval takes it: a data set by split."""
    from datasets import Dataset

    return {"test": Dataset.from_list(items())}
