"""lm-eval's tasks on the command line, for `quantize`, `eval` and the published commands."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lrquant.cli import console

if TYPE_CHECKING:
    from lrquant.evaluation import TaskResults


def split_tasks(tasks: str | None) -> list[str]:
    """`piqa,arc_easy` as names, checked before any work is spent."""
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if names:
        from lrquant.evaluation import check_tasks

        check_tasks(names)
    return names


def measure_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], num_fewshot: int | None, limit: int | None, device: str
) -> "TaskResults":
    """Results of `tasks` with the model on `device`; afterwards it returns to its previous device."""
    from lrquant.evaluation import TaskResults, run_tasks
    from lrquant.loading.pretrained import pick_device

    if not tasks:
        return TaskResults()
    home = next(model.parameters()).device
    model.to(pick_device(device))
    try:
        with console.status(f"Running {', '.join(tasks)}"):
            return run_tasks(model, tokenizer, tasks, num_fewshot, limit)
    finally:
        model.to(home)


def show_tasks(found: "TaskResults") -> None:
    """lm-eval's own table, and a line for each task that could not be run."""
    if found.table:
        console.out.print(found.table, markup=False, soft_wrap=True)
    for line in found.failed.values():
        console.note(line)
