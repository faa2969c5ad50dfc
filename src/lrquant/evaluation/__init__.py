"""Measures of quality: perplexity, lm-eval's tasks, image accuracy, answers to questions about images."""

from lrquant.evaluation.agreement import Agreement, agreement
from lrquant.evaluation.answers import AnswerQuality, answer_quality
from lrquant.evaluation.images import ImageAccuracy, image_accuracy
from lrquant.evaluation.perplexity import Perplexity, perplexity
from lrquant.evaluation.tasks import TaskResults, check_tasks, run_tasks

__all__ = [
    "Agreement",
    "AnswerQuality",
    "ImageAccuracy",
    "Perplexity",
    "TaskResults",
    "agreement",
    "answer_quality",
    "check_tasks",
    "image_accuracy",
    "perplexity",
    "run_tasks",
]
