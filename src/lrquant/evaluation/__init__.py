"""How good a model is: perplexity on text, accuracy on pictures, answers to questions about them."""

from lrquant.evaluation.answers import AnswerQuality, answer_quality
from lrquant.evaluation.images import ImageAccuracy, image_accuracy
from lrquant.evaluation.perplexity import Perplexity, perplexity

__all__ = ["AnswerQuality", "ImageAccuracy", "Perplexity", "answer_quality", "image_accuracy", "perplexity"]
