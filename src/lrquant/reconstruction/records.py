"""The record of a block."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Outcome = Literal["initial", "learned", "best epoch", "kept initial", "kept present"]

# Outcomes for people.
OUTCOME_WORDS: dict[str, str] = {
    "initial": "nothing to learn",
    "learned": "learned",
    "best epoch": "returned to its best epoch",
    "kept initial": "kept its initial values: learning did not help",
    "kept present": "unchanged: adaptation did not help",
}


@dataclass
class BlockRecord:
    """The record of one block. Losses are the recipe's reconstruction loss (losses.value).

    For a loss with two terms, learning is kept if the average ratio of the terms to their initial values is at most one
    (losses.no_worse). The sum may then have grown, if the error of one token dominates it.
    """

    index: int
    initial_loss: float
    final_loss: float
    outcome: Outcome
    epoch_losses: list[float] = field(default_factory=list)
    recoveries: int = 0  # times that a non-finite loss or gradient sent learning back
    seconds: float = 0.0
    cosine: float = 0.0  # mean cosine similarity of the quantized block's output to the full-precision model's
    epochs_left: int = 0  # that an early stop left out
    expert_tokens: dict[str, int] = field(
        default_factory=dict
    )  # expert's path in the block → calibration tokens it saw

    @property
    def outcome_words(self) -> str:
        return OUTCOME_WORDS[self.outcome]

    @property
    def seconds_saved(self) -> float:
        """The time that the skipped epochs would have taken, estimated from the average of the others."""
        return self.seconds / max(1, len(self.epoch_losses)) * self.epochs_left

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
