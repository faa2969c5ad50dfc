"""The items of lm-eval's task `zoo:shapes-vqa`: the first held-out questions of the set of that name."""

from typing import Any

from lrquant.zoo.shapes import questions

ITEMS = 400


def dataset(**_: Any) -> dict[str, Any]:
    """As lm-eval takes it: a data set by split."""
    from datasets import Dataset

    rows = [
        {"image": image, "question": asked.question, "answer": asked.answer} for image, asked in questions(False, ITEMS)
    ]
    return {"test": Dataset.from_list(rows)}


def images(row: dict[str, Any]) -> list[Any]:
    """The pictures that the question's `<image>` stands for."""
    return [row["image"]]
