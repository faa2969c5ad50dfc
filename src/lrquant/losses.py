"""Losses between a quantized block's outputs, or a quantized model's, and their full-precision targets.

Outputs and targets are (samples, tokens, width); a loss of one target is a scalar, a mean over all samples and tokens
of the step. Sums are accumulated in float32 at least.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-8
LEAST_TERM = 1e-16


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over every element."""
    return torch.nn.functional.mse_loss(_wide(output), _wide(target))


def norm_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |y_q − y_fp|² / |y_fp|: a token's squared relative error, weighted by its norm.

    MSE weights that relative error by the norm squared. In models whose first token has a hundred times the others'
    norm it is then the error of one token. Relative error alone weights all tokens alike, and loses precisely that
    token, which all others attend to. Norms below 1e-8 count as 1e-8.
    """
    wanted = _wide(target)
    squared = (_wide(output) - wanted).square().sum(-1)
    return (squared / wanted.square().sum(-1).sqrt().clamp_min(EPSILON)).mean()


def nlc(output: Tensor, target: Tensor) -> Tensor:
    """Negative logarithm of cosine similarity (LRQuant, the NLC loss): −log |mean over tokens of cos(y_q, y_fp)|.

    The cosine runs along the hidden dimension. Norms below 1e-8 count as 1e-8, so that a token whose
    output is zero has cosine 0 and no undefined gradient; the mean is kept at or above 1e-8 likewise.
    """
    return nlc_of(mean_cosine(output, target))


def mean_cosine(output: Tensor, target: Tensor) -> Tensor:
    """mean over tokens of cos(y_q, y_fp), along the hidden dimension."""
    return torch.nn.functional.cosine_similarity(_wide(output), _wide(target), dim=-1, eps=EPSILON).mean()


def nlc_of(cosine: Tensor) -> Tensor:
    """NLC of a mean cosine."""
    return -cosine.abs().clamp_min(EPSILON).log()


def divergence(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of KL(p ‖ q) in nats, between what two models' logits say; the target's is p."""
    found, wanted = _wide(output).log_softmax(-1), _wide(target).log_softmax(-1)
    return torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()


# What a loss is made of: means over samples, which ranks can add up.
MEANS = {
    "mse": (mse,),
    "mse+nlc": (mse, mean_cosine),
    "balanced": (norm_error, mean_cosine),
    "divergence": (divergence,),
}


def means(output: Tensor, targets: Sequence[Tensor], kind: str) -> Tensor:
    """The means that the loss `kind` consists of, for each target: errors or divergences, then cosines, in rows.

    (1, targets) or (2, targets), float32 at least; differentiable.
    """
    return torch.stack([torch.stack([mean(output, target) for target in targets]) for mean in MEANS[kind]])


def no_means(targets: int, kind: str, device: torch.device) -> Tensor:
    """`means` of no samples: they weigh nothing."""
    return torch.zeros(len(MEANS[kind]), targets, device=device)


def terms(found: Tensor) -> tuple[Tensor, Tensor | None]:
    """(Σ error or divergence, Σ NLC or None) over the targets, from `means` of a whole batch."""
    first, *cosines = found
    return first.sum(), nlc_of(cosines[0]).sum() if cosines else None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def value(terms: Sequence[Tensor], kind: str) -> Tensor:
    """The reported loss: the sum of its terms; for `balanced`, their geometric mean."""
    if kind != "balanced":
        return torch.stack(list(terms)).sum()
    return torch.stack([term.clamp_min(LEAST_TERM).log() for term in terms]).mean().exp()


def objective(terms: Sequence[Tensor], kind: str) -> Tensor:
    """The objective that is minimised: the loss's value; for `balanced`, its logarithm.

    The gradient ∑ ∇lossᵢ / lossᵢ (over the number of terms) then weights relative improvements of both terms equally,
    from the first step and at every scale; a term at or below 1e-16 has none.
    """
    found = value(terms, kind)
    return found.log() if kind == "balanced" else found


def no_worse(after: Sequence[float], before: Sequence[float]) -> bool:
    """Whether a loss's terms have fallen, or stayed, on average of their ratios; NaN is worse.

    The sum of MSE and NLC would be the MSE alone wherever one token's error is large.
    """
    if len(after) == 1:
        return after[0] <= before[0]
    return sum(now / max(then, EPSILON) for now, then in zip(after, before, strict=True)) <= len(after)


class RunningBalance:
    """LRQuant+'s dynamically weighted sum: Σ lossᵢ / (emaᵢ + 1e-6), averages from 1, momentum 0.95, no gradient."""

    def __init__(self, momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.averages: list[Tensor] = []

    def __call__(self, *terms: Tensor) -> Tensor:
        if not self.averages:
            self.averages = [torch.ones_like(term.detach()) for term in terms]
        self.averages = [
            self.momentum * average + (1 - self.momentum) * term.detach()
            for average, term in zip(self.averages, terms, strict=True)
        ]
        return sum(  # type: ignore[return-value]
            term / (average + 1e-6) for term, average in zip(terms, self.averages, strict=True)
        )
