"""How good a model is: perplexity on text."""

from lrquant.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
