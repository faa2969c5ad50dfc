"""If the hub is unreachable, use its cache at once instead of retrying for minutes."""

from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 5.0  # for the hub's first answer


def hub_answers() -> bool:
    """Whether the hub can be reached; tried once, with a short timeout."""
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
    """A context in which data sets come only from the cache if the hub is unreachable."""
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
