"""Learning rates, which depend on the number of AdamW's steps unless the recipe sets them."""

from lrquant.recipe import Recipe

PAPER_LET_LR, PAPER_LWC_LR = 5e-3, 1e-2  # at 20 epochs over 128 samples, one sample a step
PAPER_STEPS = 20 * 128
RATE_POWER, MOST_RATE = 0.75, 32.0
ROUNDING_TRAVEL, MOST_ROUNDING_RATE = 2.5, 0.02


def _growth(steps: int) -> float:
    """The factor relative to the papers' rates for 2560 steps: (2560/steps)^¾, at most 32 (docs/benchmarks.md).

    Adam moves a parameter by about its rate per step, so fewer steps need higher rates.
    """
    return min(max(1.0, PAPER_STEPS / steps) ** RATE_POWER, MOST_RATE)


def smoothing_rate(recipe: Recipe, steps: int) -> float:
    """The rate of scales and shifts: the papers' 5e-3 for 2560 steps."""
    return recipe.let_lr or PAPER_LET_LR * _growth(steps)


def clipping_rate(recipe: Recipe, steps: int) -> float:
    """The rate of clipping logits: the papers' 1e-2 for 2560 steps."""
    return recipe.lwc_lr or PAPER_LWC_LR * _growth(steps)


def rotation_rate(recipe: Recipe, steps: int) -> float:
    """The rate of factors on weights that start at one: that of clipping, but at most the papers'."""
    return min(clipping_rate(recipe, steps), PAPER_LWC_LR)


def rounding_rate(recipe: Recipe, steps: int) -> float:
    """The rate of rounding offsets.

    An offset must be able to move from −½ to ½ within a schedule whose mean rate is half the initial one. Rates above
    0.02 are harmful (docs/benchmarks.md).
    """
    return recipe.rounding_lr or min(MOST_ROUNDING_RATE, ROUNDING_TRAVEL / steps)
