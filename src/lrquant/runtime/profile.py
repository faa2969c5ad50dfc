"""A profile of a run: its wall-clock time by parts, which never overlap and add up.

    with profiling() as profile:
        with part("steps"):
            ...

A part that begins inside another pauses it. Time outside all parts is "other". Without a profile, a part costs only a
look-up.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

OTHER = "other"

P = ParamSpec("P")
R = TypeVar("R")


class Profile:
    """Seconds of wall time by part, in the order in which parts began first."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {OTHER: 0.0}
        self._open = [OTHER]
        self._since = clock()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within, time belongs to `name`, until another part begins inside."""
        self._settle()
        self._open.append(name)
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds of every part until now, "other" last."""
        self._settle()
        other = {OTHER: self._seconds[OTHER]}
        return {name: spent for name, spent in self._seconds.items() if name != OTHER} | other

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now


_CURRENT: ContextVar[Profile | None] = ContextVar("profile", default=None)


@contextmanager
def profiling() -> Iterator[Profile]:
    """Within, parts are timed; inside another profile they are timed there."""
    current = _CURRENT.get()
    if current is not None:
        yield current
        return
    profile = Profile()
    token = _CURRENT.set(profile)
    try:
        yield profile
    finally:
        _CURRENT.reset(token)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Within, time belongs to the part `name` of the profile, where there is one."""
    current = _CURRENT.get()
    if current is None:
        yield
        return
    with current.part(name):
        yield


def timed(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: calls of the function belong to the part `name`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with part(name):
                return function(*args, **kwargs)

        return call

    return decorate
