"""Images with text: bundled questions and answers, or rows of a JSON-lines file.

A row has `image`, a path relative to the file, and either `text` (with an `answer` where there is one) or a
`conversation`: a list of `{"role": "user" | "assistant", "content": …}` whose first turn is the user's.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lrquant.calibration.images import open_picture
from lrquant.errors import UsageError
from lrquant.zoo import shapes

ZOO_QUESTIONS = "zoo:shapes-vqa"
Turn = tuple[str, str]  # role, text


@dataclass(frozen=True)
class Dialogue:
    """An image and the text about it."""

    load: Callable[[], Image.Image]
    turns: tuple[Turn, ...]

    @property
    def answer(self) -> str | None:
        """The last turn, when it is the assistant's."""
        role, text = self.turns[-1]
        return text if role == "assistant" else None


def is_dialogues(source: str) -> bool:
    """Whether `source` names a set of images with text."""
    return source == ZOO_QUESTIONS or source.endswith(".jsonl")


def dialogues(source: str, train: bool, limit: int | None, seed: int = 0) -> list[Dialogue]:
    """Up to `limit` dialogues of `source`: for calibration (`train`) drawn by `seed`, for evaluation from the start.

    Raises:
        UsageError: no such source, or a row without a question about an image.
    """
    if source == ZOO_QUESTIONS:
        count = limit or 1000
        start = seed * count if train else 0
        return [
            Dialogue(image.copy, (("user", asked.question), ("assistant", asked.answer)))
            for image, asked in shapes.questions(train, count, start)
        ]
    path = Path(source)
    if not path.is_file() or path.suffix != ".jsonl":
        raise UsageError(f"{source}: images with text come from {ZOO_QUESTIONS} or a .jsonl file")
    try:
        lines = [(number, line) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text ({error})") from None
    if not lines:
        raise UsageError(f"{path}: it has no rows")
    if train:
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
        lines = [lines[index] for index in order]
    return [_row(path, number, line) for number, line in lines[:limit]]


def _row(path: Path, number: int, line: str) -> Dialogue:
    where = f"{path}:{number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not valid JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a row is an object with image and text or conversation")
    if not isinstance(row.get("image"), str) or not row["image"]:
        raise UsageError(f"{where}: this text has no image, and the model needs one")
    picture = path.parent / row["image"]
    if not picture.is_file():
        raise UsageError(f"{where}: there is no image {row['image']} beside the file")
    return Dialogue(lambda: open_picture(picture), _turns(row, where))


def _turns(row: dict[str, Any], where: str) -> tuple[Turn, ...]:
    if isinstance(row.get("text"), str):
        turns = [("user", row["text"])]
        return tuple(turns + ([("assistant", str(row["answer"]))] if "answer" in row else []))
    conversation = row.get("conversation")
    wanted = f"{where}: needs text, or a conversation of turns with role and content that starts with the user's turn"
    if not isinstance(conversation, list) or not conversation:
        raise UsageError(wanted)
    turns = []
    for turn in conversation:
        if not isinstance(turn, dict) or turn.get("role") not in ("user", "assistant"):
            raise UsageError(wanted)
        if not isinstance(turn.get("content"), str):
            raise UsageError(wanted)
        turns.append((turn["role"], turn["content"]))
    if turns[0][0] != "user":
        raise UsageError(wanted)
    return tuple(turns)


def prompt(processor: Any, turns: tuple[Turn, ...], answer_next: bool) -> str:
    """The dialogue as rendered by the processor's chat template, with the image before the first turn."""
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    messages[0]["content"] = [{"type": "image"}, *messages[0]["content"]]  # type: ignore[list-item]
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(messages, add_generation_prompt=answer_next)
    return f"{processor.image_token}\n" + "\n".join(text for _, text in turns)


def dialogue_inputs(processor: Any, image: Image.Image, text: str) -> dict[str, Any]:
    """Keyword arguments of a call with one image and its text."""
    begin = getattr(processor.tokenizer, "bos_token", None) or ""
    written = bool(begin) and text.startswith(begin)  # templates that write it, tokenizers that add it
    inputs = processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=not written)
    return dict(inputs)


def dialogue_samples(processor: Any, source: str, nsamples: int, seed: int) -> list[dict[str, Any]]:
    """Keyword arguments of `nsamples` calls with one dialogue each, answers included.

    Raises:
        UsageError: there are fewer dialogues.
    """
    drawn = dialogues(source, train=True, limit=nsamples, seed=seed)
    if len(drawn) < nsamples:
        raise UsageError(f"{source}: {len(drawn)} dialogues are not enough for {nsamples} samples")
    return [
        dialogue_inputs(processor, each.load(), prompt(processor, each.turns, answer_next=False)) | {"use_cache": False}
        for each in drawn
    ]
