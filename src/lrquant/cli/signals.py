"""Control-C and SIGTERM: the first signal ends the work with a message, the second ends the program at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lrquant.errors import Terminated

RETRY = 0.05  # seconds


@contextmanager
def handled() -> Iterator[None]:
    """A context in which SIGTERM raises `Terminated`; a second signal ends the program by default.

    Nothing is lost, because everything that an interrupted run keeps is already on disk. Python ignores exceptions
    while an object is finalized; a signal at that moment is raised afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        seen = True
        begin_to_end(number, frame)

    def begin_to_end(number: int, frame: FrameType | None) -> None:
        if _finalizes(frame):
            signal.signal(signal.SIGALRM, lambda _, later: begin_to_end(number, later))
            signal.setitimer(signal.ITIMER_REAL, RETRY)
            return
        raise Terminated("terminated") if number == signal.SIGTERM else KeyboardInterrupt

    caught = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, end) for each in caught}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _finalizes(frame: FrameType | None) -> bool:
    """Whether `frame` runs within an object's `__del__`."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
