"""How good a model is: perplexity on text, and lm-eval's tasks."""

from lrquant.evaluation.perplexity import Perplexity, perplexity
from lrquant.evaluation.tasks import TaskResults, check_tasks, run_tasks

__all__ = ["Perplexity", "TaskResults", "check_tasks", "perplexity", "run_tasks"]
