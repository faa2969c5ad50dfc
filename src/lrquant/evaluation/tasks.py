"""Zero-shot and few-shot tasks through lm-eval's own wrapper of transformers models.

Tasks run one by one, so that one whose data cannot be fetched does not affect the others. `zoo:cloze` and, with images,
`zoo:shapes-vqa` are lrquant's own tasks (see lrquant.zoo.tasks) and need no network.
"""

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lrquant.errors import UsageError
from lrquant.loading.auto_class import modality_of
from lrquant.loading.offline import cache_if_unreachable
from lrquant.zoo import ZOO_PREFIX

OWN_TASKS = f"{ZOO_PREFIX}cloze or {ZOO_PREFIX}shapes-vqa"
ZOO_TASKS = Path(__file__).parents[1] / "zoo" / "tasks"


@dataclass
class TaskResults:
    """lm-eval's figures by task, its table of them, and a line for every task that could not be run."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    table: str = ""
    failed: dict[str, str] = field(default_factory=dict)


def check_tasks(tasks: Sequence[str]) -> Any:
    """lm-eval's task manager, after making sure that it knows every task.

    Raises:
        UsageError: lm-eval is not installed, or a name is unknown.
    """
    manager = _manager()
    for task in tasks:
        if not manager.match_tasks([_lm_eval_name(task)]):
            raise UsageError(f"unknown task {task!r}: give names of lm-eval's tasks, {OWN_TASKS}")
    return manager


@cache
def _manager() -> Any:
    """lm-eval's task manager; it reads thousands of files."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError("tasks need lm-eval, which is not installed: pip install 'lrquant[eval]'") from None
    return TaskManager(include_path=str(ZOO_TASKS))


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> TaskResults:
    """Evaluate `model` on `tasks`. `num_fewshot` None: the task's own; `limit`: only so many items of each.

    `tokenizer` is a multimodal model's processor. Tasks with pictures are asked through its chat template.

    Raises:
        UsageError: the model takes no text.
    """
    manager = check_tasks(tasks)
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.utils import make_table

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = lambda: None  # would ask git about the user's folder, which may answer aloud
    wrapped = _wrapped(model, tokenizer, batch_size)
    processor = getattr(wrapped, "processor", None)
    merged: dict[str, Any] = {}
    outcome = TaskResults()
    for task in tasks:
        try:
            with cache_if_unreachable(), redirect_stderr(io.StringIO()):  # its progress bars cannot be turned off
                chat = bool(processor and processor.chat_template) and _has_pictures(manager, task)
                found = simple_evaluate(
                    wrapped,
                    tasks=[_lm_eval_name(task)],
                    num_fewshot=num_fewshot,
                    limit=limit,
                    task_manager=manager,
                    log_samples=False,
                    apply_chat_template=chat,
                )
        except Exception as error:  # the libraries underneath raise a dozen kinds when the hub is away
            first = next(iter(str(error).splitlines()), "")
            outcome.failed[task] = f"task {task!r} could not be run ({type(error).__name__}: {first[:160]})"
            continue
        for key, value in found.items():
            if isinstance(value, dict):
                merged.setdefault(key, {}).update(value)
    if merged:
        outcome.results, outcome.table = merged["results"], make_table(merged)
    return outcome


def _wrapped(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's wrapper of a text model, or of one that takes text and pictures."""
    modality = modality_of(model)
    if modality == "text":
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    if modality == "sentences":
        raise UsageError("lm-eval's tasks need a model that generates text, and this one does not")
    if modality == "image":
        raise UsageError("lm-eval's tasks are text, and this model takes only images: use --images")
    from lm_eval.models.hf_vlms import HFMultimodalLM

    class Wrapped(HFMultimodalLM):
        """Takes the processor that it is given; lm-eval's own only reads one from a path."""

        def _create_tokenizer(self, *_: Any, **__: Any) -> None:
            self.processor, self.tokenizer = tokenizer, tokenizer.tokenizer

    return Wrapped(pretrained=model, batch_size=batch_size)


def _has_pictures(manager: Any, task: str) -> bool:
    def tasks_in(group: dict[Any, Any]) -> Iterator[Any]:
        for part in group.values():
            yield from tasks_in(part) if isinstance(part, dict) else [part]

    found = manager.load_task_or_group(_lm_eval_name(task))
    return any(getattr(part, "MULTIMODAL", False) for part in tasks_in(found))


def _lm_eval_name(task: str) -> str:
    return task.replace(":", "_") if task.startswith(ZOO_PREFIX) else task
