"""What is remembered of a run."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Outcome = Literal["initial", "learned", "best epoch", "kept initial", "kept present"]


@dataclass
class BlockRecord:
    """One block's story. Losses are the recipe's reconstruction loss, plain MSE or MSE + NLC."""

    index: int
    initial_loss: float
    final_loss: float
    outcome: Outcome
    # "initial": nothing to learn; "kept initial": learning ended worse and was undone;
    # "kept present": an adapted block would have been worse than the checkpoint's
    epoch_losses: list[float] = field(default_factory=list)
    recoveries: int = 0  # times that a non-finite loss or gradient sent learning back
    seconds: float = 0.0
    cosine: float = 0.0  # mean cosine similarity of the quantized block's output to the full-precision model's
    epochs_left: int = 0  # that an early stop left out
    expert_tokens: dict[str, int] = field(
        default_factory=dict
    )  # expert's path in the block → calibration tokens it saw

    @property
    def seconds_saved(self) -> float:
        """What the epochs left out would have taken, as long as the others on average."""
        return self.seconds / max(1, len(self.epoch_losses)) * self.epochs_left

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
