"""Scalars of a run for TensorBoard and Weights & Biases, written by their own packages when asked for."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrquant.cli import console
from lrquant.errors import UsageError
from lrquant.reconstruction.callbacks import Callback

if TYPE_CHECKING:
    from lrquant.reconstruction.records import BlockRecord

RUNS = Path("runs")  # where TensorBoard looks by custom


class Tracker(StrEnum):
    """Packages that can receive a run's scalars."""

    tensorboard = "tensorboard"
    wandb = "wandb"


class Tracking(Callback, ABC):
    """Sends scalars to a tracker: the loss of every epoch, the values of every block, then the results."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}

    @abstractmethod
    def scalar(self, name: str, value: float, step: int) -> None: ...

    def epoch_done(self, block: int, epoch: int, loss: float) -> None:
        self.scalar(f"loss/block {block}", loss, epoch)

    def block_done(self, record: "BlockRecord") -> None:
        for name in ("initial_loss", "final_loss", "cosine", "seconds", "recoveries"):
            self.scalar(f"blocks/{name}", float(getattr(record, name)), record.index)

    def results(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.scalar(f"results/{name}", value, 0)

    @abstractmethod
    def close(self) -> None: ...


class _TensorBoard(Tracking):
    def __init__(self, folder: Path, configuration: dict[str, Any]) -> None:
        super().__init__()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "--log-to tensorboard: the package is not installed: pip install 'lrquant[tensorboard]'"
            ) from None
        self.writer = SummaryWriter(str(folder))
        text = "\n".join(f"    {name}: {value}" for name, value in configuration.items())
        self.writer.add_text("recipe", text)

    def scalar(self, name: str, value: float, step: int) -> None:
        self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb(Tracking):
    def __init__(self, name: str, configuration: dict[str, Any]) -> None:
        super().__init__()
        try:
            import wandb
        except ImportError:
            raise UsageError("--log-to wandb: the package is not installed: pip install 'lrquant[wandb]'") from None
        settings = wandb.Settings(silent=True)
        self.run = wandb.init(name=name, config=configuration, settings=settings)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Weights & Biases has a single step counter; blocks and epochs are separate axes."""
        axis = f"{name.partition('/')[0]}/step"
        if name not in self.steps:
            self.run.define_metric(name, step_metric=axis)
        self.steps[name] = step
        self.run.log({name: value, axis: step})

    def close(self) -> None:
        self.run.finish(quiet=True)


@contextmanager
def tracking(wanted: Sequence[Tracker], name: str, configuration: dict[str, Any]) -> Iterator[list[Tracking]]:
    """One open tracker for each that is `wanted`.

    Raises:
        UsageError: its package is not installed.
    """
    opened: list[Tracking] = []
    try:
        for tracker in dict.fromkeys(wanted):
            if tracker is Tracker.tensorboard:
                opened.append(_TensorBoard(RUNS / name, configuration))
                console.note(f"scalars are written to {RUNS / name}: tensorboard --logdir {RUNS}")
            else:
                opened.append(_Wandb(name, configuration))
        yield opened
    finally:
        for open_tracker in opened:
            open_tracker.close()
