"""Work in a forked child of this warm process, which may be killed: a kill costs no second start of Python."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

import torch


def start(work: Callable[[], object]) -> int:
    """Fork; the child does `work` and ends with 0, or 3 after an exception. Returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        # After a fork torch renews its pool of threads at the first use, which two threads at once do not survive.
        torch.set_num_threads(torch.get_num_threads())
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The child's exit code; -9 when it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
