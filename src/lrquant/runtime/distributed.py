"""Several processes of one run, started by `torchrun`: the rank of this process, and communication with the others.

    torchrun --nproc-per-node 4 -m lrquant quantize …

Rank r of N owns the calibration samples (and evaluation windows) whose index modulo N is r. The loss of a step consists
of means over the batch. Each rank's part is weighted and summed over the ranks *before* any nonlinear function (the
logarithm of NLC, running averages). So every rank has the loss of the batch, and the sum of the ranks' gradients is the
gradient of that loss. Every rank then takes the same step. With one process there is no overhead: `ALONE` returns its
inputs.

All values are sent as tensors, in the same order on all ranks; nothing is pickled.
"""

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lrquant.errors import LrquantError, UsageError

PATIENCE = timedelta(minutes=30)  # with a rank that lives and says nothing, such as one that writes the checkpoint
SMALL = 1 << 16  # elements up to which gradients travel together

_Item = TypeVar("_Item")


class LostRank(LrquantError):
    """Another rank ended before its work was done; its own error says why."""


@dataclass(frozen=True)
class Ranks:
    """This process and the others of the run. `device` holds the values that are sent."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Those of `items` that this rank owns."""
        return items if self.alone else items[self.rank :: self.world]

    def own(self, samples: Sequence[int]) -> list[int]:
        """Those of `samples` (indices in the whole run) that this rank owns, as indices in its share."""
        return [sample // self.world for sample in samples if sample % self.world == self.rank]

    def mean(self, means: Tensor, share: float) -> Tensor:
        """Means over all ranks, differentiable. `share` is this rank's weight; all weights add up to one."""
        return means if self.alone else _WeightedSum.apply(means, share)  # type: ignore[no-any-return]

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Make each parameter's gradient the sum over the ranks; one that a rank has none for counts as zero there."""
        if self.alone:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        small = [gradient for gradient in gradients if gradient.numel() <= SMALL]
        with _together():
            for gradient in gradients:
                if gradient.numel() > SMALL:
                    dist.all_reduce(gradient)
            if small:
                packed = torch.cat([gradient.flatten() for gradient in small])
                dist.all_reduce(packed)
                parts = packed.split([gradient.numel() for gradient in small])
                for gradient, part in zip(small, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks; no gradient."""
        if self.alone:
            return value
        total = value.detach().to(self.device, copy=True)
        with _together():
            dist.all_reduce(total)
        return total.to(value.device)

    def most(self, value: Tensor) -> Tensor:
        """The largest of the ranks', element by element."""
        if self.alone:
            return value
        found = value.detach().to(self.device, copy=True)
        with _together():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.to(value.device)

    def all(self, holds: bool) -> bool:
        """Whether it holds on every rank."""
        return holds if self.alone else int(self.sum(torch.tensor(int(holds)))) == self.world

    def follow(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite `tensors` with those of the first rank, so that ranks do not diverge."""
        if self.alone:
            return
        with _together(), torch.no_grad():
            for tensor in tensors:
                moved = tensor.detach().to(self.device).contiguous()
                dist.broadcast(moved, 0)
                tensor.copy_(moved)

    def in_order(self, mine: Tensor, total: int) -> Tensor:
        """Rows of all ranks, (total, …), in the order of the whole run; `mine` holds this rank's."""
        if self.alone:
            return mine
        rows = mine.new_zeros(total, *mine.shape[1:])
        rows[self.rank :: self.world] = mine
        return self.sum(rows)

    def text(self, text: str) -> str:
        """The first rank's `text`, on all of them."""
        if self.alone:
            return text
        content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else _NOTHING
        return self._bytes(content).numpy().tobytes().decode()

    def tensors(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first rank's tensors, on all of them; the others' are not looked at."""
        if self.alone:
            return dict(given)
        described = {name: (str(value.dtype)[6:], list(value.shape)) for name, value in given.items()}
        found = {}
        for name, (dtype, shape) in json.loads(self.text(json.dumps(described))).items():
            content = given[name].detach().cpu().contiguous().flatten().view(torch.uint8) if self.first else _NOTHING
            found[name] = self._bytes(content).view(getattr(torch, dtype)).view(shape)
        return found

    def _bytes(self, content: Tensor) -> Tensor:
        """The first rank's bytes, on the CPU."""
        length = torch.tensor(content.numel(), device=self.device)
        self.follow([length])
        moved = (content if self.first else torch.empty(int(length), dtype=torch.uint8)).to(self.device)
        if int(length):
            self.follow([moved])
        return moved.cpu()

    def wait(self) -> None:
        """Until all ranks are here."""
        self.all(True)


ALONE = Ranks()
_NOTHING = torch.empty(0, dtype=torch.uint8)


class _WeightedSum(torch.autograd.Function):
    """Σ over ranks of share·value. Backward gives a rank its own part; the parts of all ranks are then summed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, share: float) -> Tensor:  # type: ignore[override]
        ctx.share = share
        total = value.detach().double() * share
        with _together():
            dist.all_reduce(total)
        return total.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.share, None


@contextmanager
def _together() -> Iterator[None]:
    """Within, the others take part; where one does not any more, that is the error."""
    try:
        yield
    except RuntimeError as error:
        raise LostRank("another rank has ended or cannot be reached; see its message") from error


def launched() -> bool:
    """Whether this process is one of several that `torchrun` started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def local_rank() -> int:
    """This process's number on its machine, which is its GPU's number."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def local_world() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1


_left = False


def join(device: torch.device) -> Ranks:
    """Connect to the other ranks, or return `ALONE`. Values are sent by NCCL between GPUs, otherwise by Gloo.

    Raises:
        LostRank: they are not there.
    """
    if _left or not launched():
        return ALONE
    if not dist.is_initialized():
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _told_to_end)
        with _together():
            on_gpu = device.type == "cuda"
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", timeout=PATIENCE, device_id=device if on_gpu else None
            )
    on = device if dist.get_backend() == "nccl" else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), on)


def leave() -> None:
    """Disconnect from the other ranks."""
    global _left
    if dist.is_available() and dist.is_initialized():
        _left = True
        dist.destroy_process_group()


@contextmanager
def apart() -> Iterator[None]:
    """A context in which libraries see no other ranks: compressed-tensors would share work among them."""
    real = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        yield
    finally:
        dist.is_initialized = real


def check_batch(batch: int, samples: int, ranks: Ranks, learns: bool) -> None:
    """Raise unless the work can be divided.

    Raises:
        UsageError: a step's samples cannot be divided evenly, or there are fewer samples than ranks.
    """
    if samples < ranks.world:
        raise UsageError(f"{samples} samples cannot be divided over {ranks.world} ranks; use more samples")
    if learns and batch % ranks.world:
        more = -(-batch // ranks.world) * ranks.world
        raise UsageError(
            f"batch size {batch} cannot be divided over {ranks.world} ranks: "
            f"give --batch-size {more}, or another multiple"
        )


def _told_to_end(*_: object) -> None:
    raise LostRank("stopped, as torchrun does when another rank has failed; see that rank's message")
