"""The model and data-set hub when it cannot be reached: its cache, at once, instead of minutes of retries."""

from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 5.0  # for the hub's first answer


def hub_answers() -> bool:
    """Whether the hub can be reached, asked once with little patience."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # whichever HTTP library the hub's client uses has its own kinds
        return False
    return True


@contextmanager
def cache_if_unreachable() -> Iterator[None]:
    """Within, data sets come from the cache alone where the hub does not answer."""
    if hub_answers():
        yield
        return
    import datasets.config
    from huggingface_hub import constants

    # The libraries read their environment variable once, on import; what it sets is what their code asks.
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
