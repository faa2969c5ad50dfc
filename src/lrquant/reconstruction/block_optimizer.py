"""Learn one block: AdamW on a few vectors, so that the output of the quantized block stays close to the original's.

After a non-finite loss or gradient, the learnables return to the best epoch's state and the rates are halved, a few
times. A block that ends worse than it began gets its initial values back.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrquant.losses import RunningBalance, no_worse, objective, terms, value
from lrquant.recipe import Recipe
from lrquant.reconstruction.learnables import Learnables, keep_within_bounds, parameter_groups
from lrquant.reconstruction.records import Outcome
from lrquant.runtime.distributed import ALONE, Ranks
from lrquant.runtime.profile import timed

FLAT_EPOCHS = 2  # over which an early stop looks at the loss
MOST_RECOVERIES = 5
MOST_MEASURED = 32  # samples on which the loss before and after is compared

# (learnables, indices of this rank's samples) → losses.means over them, of one target per branch; zeros for no samples
Forward = Callable[[Learnables, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Batches:
    """How many samples there are, and how many a step takes, over all ranks."""

    samples: int
    size: int
    ranks: Ranks = ALONE

    @property
    def per_epoch(self) -> int:
        return math.ceil(self.samples / self.size)


@dataclass
class Learned:
    """The outcome of learning one block."""

    learnables: Learnables
    outcome: Outcome
    initial_loss: float
    final_loss: float
    epoch_losses: list[float]
    recoveries: int
    epochs_left: int = 0  # not needed: the loss had flattened
    final_terms: Sequence[float] = ()  # what `final_loss` is made of


def batch_loss(forward: Forward, learnables: Learnables, part: Sequence[int], *, ranks: Ranks) -> list[Tensor]:
    """The terms of the loss over the samples `part`, the same on every rank, even if a rank holds none of them."""
    mine = ranks.own(part)
    return [term for term in terms(ranks.mean(forward(learnables, mine), len(mine) / len(part))) if term is not None]


def shuffled(samples: int, batch: int, generator: torch.Generator) -> list[int]:
    """An epoch's order of samples: a batch takes one of every residue class modulo `batch`, each class in random order.

    So every batch is divided evenly over any number of ranks that divides `batch`, and the order does not depend on it.
    """
    classes = [
        torch.arange(first, samples, batch)[torch.randperm(len(range(first, samples, batch)), generator=generator)]
        for first in range(min(batch, samples))
    ]
    return [int(members[turn]) for turn in range(len(classes[0])) for members in classes if turn < len(members)]


@timed("measure")
@torch.no_grad()
def measure(forward: Forward, learnables: Learnables, batches: Batches) -> list[float]:
    """Means of the loss's terms over up to `MOST_MEASURED` samples, spread evenly."""
    samples, ranks = batches.samples, batches.ranks
    chosen = torch.linspace(0, samples - 1, min(samples, MOST_MEASURED)).round().long().tolist()
    parts = [chosen[start : start + batches.size] for start in range(0, len(chosen), batches.size)]
    found = [[float(term) * len(part) for term in batch_loss(forward, learnables, part, ranks=ranks)] for part in parts]
    return [sum(column) / len(chosen) for column in zip(*found, strict=True)]


@timed("steps")
def learn(
    forward: Forward,
    initial: Learnables,
    batches: Batches,
    *,
    recipe: Recipe,
    seed: int,
    on_epoch: Callable[[int, float], None],
) -> Learned:
    """Minimise the loss over all samples from `initial`; `on_epoch(epoch, loss)` is called after every epoch."""
    samples, ranks = batches.samples, batches.ranks
    before = measure(forward, initial, batches)
    initial_loss = reported(before, recipe.loss)
    if not recipe.epochs or not initial:
        return Learned(initial, "initial", initial_loss, initial_loss, [], 0, final_terms=before)

    current = {name: tensor.clone().requires_grad_() for name, tensor in initial.items()}
    best, best_loss = initial, initial_loss if math.isfinite(initial_loss) else math.inf
    epoch_losses: list[float] = []
    recoveries = epochs_left = 0
    generator = torch.Generator().manual_seed(seed)
    device = next(iter(initial.values())).device
    balance = _balance(recipe)
    optimizer, schedule = _optimizer(current, recipe, batches.per_epoch)
    for epoch in range(recipe.epochs):
        order = shuffled(samples, batches.size, generator)
        total = torch.zeros((), device=device)
        for start in range(0, samples, batches.size):
            part = sorted(order[start : start + batches.size])
            parts = batch_loss(forward, current, part, ranks=ranks)
            loss = balance(*parts) if balance else objective(parts, recipe.loss)
            optimizer.zero_grad()
            if loss.requires_grad:  # else this rank holds none of the batch
                loss.backward()
            ranks.sum_gradients(list(current.values()))
            optimizer.step()
            schedule.step()
            keep_within_bounds(current)
            total += value(parts, recipe.loss).detach() * len(part)
        ranks.follow([total, *current.values()])
        # Looked at once per epoch: asking after every step would keep an accelerator waiting. One NaN anywhere stays.
        if bool(torch.isfinite(total)) and _are_finite(current):
            epoch_losses.append(float(total) / samples)
            on_epoch(epoch, epoch_losses[-1])
            if epoch_losses[-1] < best_loss:
                best, best_loss = _copy(current), epoch_losses[-1]
            if has_flattened(epoch_losses, recipe.early_stop):
                epochs_left = recipe.epochs - epoch - 1
                break
            continue
        recoveries += 1
        if recoveries > MOST_RECOVERIES:
            break
        current = {name: tensor.clone().requires_grad_() for name, tensor in best.items()}
        balance = _balance(recipe)
        optimizer, schedule = _optimizer(current, recipe, batches.per_epoch, factor=0.5**recoveries, done=epoch + 1)

    final = _copy(current)
    after = measure(forward, final, batches)
    outcome: Outcome = "learned"
    if not no_worse(after, before) and best is not initial:
        final, outcome = best, "best epoch"
        after = measure(forward, final, batches)
    if not no_worse(after, before):
        final, outcome, after = initial, "kept initial", before
    final_loss = reported(after, recipe.loss)
    return Learned(final, outcome, initial_loss, final_loss, epoch_losses, recoveries, epochs_left, after)


def reported(measured: Sequence[float], kind: str) -> float:
    """The loss whose terms are `measured`, in one number."""
    return float(value([torch.tensor(term, dtype=torch.float64) for term in measured], kind))


def has_flattened(losses: Sequence[float], share: float) -> bool:
    """Whether the last two epochs together lowered the loss by less than `share` of it."""
    return share > 0 and len(losses) > FLAT_EPOCHS and losses[-1] > (1 - share) * losses[-1 - FLAT_EPOCHS]


def or_present(learned: Learned, present: Forward, batches: Batches, *, recipe: Recipe) -> Learned:
    """`learned`, unless the block's present parameters give a lower loss."""
    now = measure(present, {}, batches)
    loss = reported(now, recipe.loss)
    learned = replace(learned, initial_loss=loss)
    if no_worse(learned.final_terms, now):
        return learned
    return replace(learned, outcome="kept present", final_loss=loss, final_terms=now)


def _balance(recipe: Recipe) -> RunningBalance | None:
    """The averages of the dynamic loss; the loss `balanced` needs none."""
    return RunningBalance() if recipe.dynamic_loss and recipe.loss != "balanced" else None


def _are_finite(learnables: Learnables) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in learnables.values())


def _copy(learnables: Learnables) -> Learnables:
    return {name: tensor.detach().clone() for name, tensor in learnables.items()}


def _optimizer(
    learnables: Learnables, recipe: Recipe, per_epoch: int, *, factor: float = 1.0, done: int = 0
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with the recipe's rates times `factor`; the schedule covers epochs after `done`, of `per_epoch` steps."""
    groups = parameter_groups(learnables, recipe, recipe.epochs * per_epoch)
    for group in groups:
        group["lr"] *= factor
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    steps = max(1, recipe.epochs - done) * per_epoch
    if recipe.schedule == "cosine":
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
