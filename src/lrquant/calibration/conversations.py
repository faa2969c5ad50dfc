"""Conversations in text tables, rendered by the tokenizer's chat template, as the model saw them in training.

messages        [{"role": "user", "content": "…"}, …]                      what chat interfaces use
conversations   [{"from": "human", "value": "…"}, …]                       ShareGPT's
instruction     with output, and input where there is one                  Alpaca's
"""

from collections.abc import Mapping
from typing import Any

from lrquant.errors import UsageError

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}  # ShareGPT's → the template's
KINDS = "'messages', 'conversations' or 'instruction' with 'output'"


def has_conversations(columns: Mapping[str, Any]) -> bool:
    """Whether a table with these columns holds conversations."""
    return bool({"messages", "conversations"} & columns.keys()) or {"instruction", "output"} <= columns.keys()


def rendered(row: Mapping[str, Any], tokenizer: Any, source: str) -> str:
    """The conversation in `row` as text.

    Raises:
        UsageError: the tokenizer has no chat template, or the template does not take this conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{source}: holds conversations, and the model's tokenizer has no chat template to render them with; "
            "give plain text (a column named 'text')"
        )
    try:
        text: str = tokenizer.apply_chat_template(_messages(row), tokenize=False)
    except Exception as error:  # a template is a program, and raises what it likes
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{source}: the chat template cannot render one of its conversations ({first})") from None
    return text


def _messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    if row.get("messages"):
        return [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
    if row.get("conversations"):
        turns = [(turn.get("from") or turn["role"], turn.get("value") or turn.get("content") or "")
                 for turn in row["conversations"]]  # fmt: skip
        return [{"role": _ROLES.get(role, role), "content": text} for role, text in turns]
    asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
