"""Parts of a profile never overlap, so they add up to the whole."""

from collections.abc import Iterator

import pytest

from lrquant.runtime.profile import Profile, part, profiling, timed


@pytest.fixture
def clock() -> Iterator[float]:
    """Seconds 0, 1, 2, …: one for each look at the clock."""
    return iter(float(second) for second in range(100))


def test_a_part_inside_another_pauses_it(clock: Iterator[float]) -> None:
    profile = Profile(lambda: next(clock))  # 0
    with profile.part("learn"):  # 1
        with profile.part("measure"):  # 2
            pass  # 3
        with profile.part("measure"):  # 4
            pass  # 5
    # 6
    assert profile.seconds() == {"learn": 3.0, "measure": 2.0, "other": 2.0}  # 7


def test_a_part_ends_with_its_error(clock: Iterator[float]) -> None:
    profile = Profile(lambda: next(clock))
    with pytest.raises(ValueError, match="inside"), profile.part("learn"):
        raise ValueError("inside")
    assert profile.seconds() == {"learn": 1.0, "other": 2.0}


def test_functions_are_timed_only_where_somebody_profiles() -> None:
    @timed("work")
    def work(x: int) -> int:
        return x + 1

    assert work(1) == 2
    with part("nowhere"):
        pass
    with profiling() as profile:
        assert work(2) == 3
        with profiling() as inner:
            assert inner is profile
    assert list(profile.seconds()) == ["work", "other"]
