"""Upload results to the hub by huggingface_hub, with its environment variables (HF_TOKEN, HF_HUB_OFFLINE …)."""

from pathlib import Path

from lrquant.errors import LrquantError, UsageError


def check_can_push(repository: str) -> None:
    """Raise before any work is done if an upload could not begin."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise UsageError(f"--push-to-hub {repository!r}: not a repository name (USER/NAME)") from None
    if constants.HF_HUB_OFFLINE:
        raise UsageError("--push-to-hub: HF_HUB_OFFLINE is set; unset it or leave the option out")
    if get_token() is None:
        raise UsageError("--push-to-hub: not logged in to the hub; run hf auth login, or set HF_TOKEN")


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload everything in `folder`; returns the address.

    Raises:
        LrquantError: the hub refused or could not be reached; the folder is unchanged.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Quantized with lrquant"))
    except (OSError, ValueError) as error:  # huggingface_hub's HTTP errors are OSErrors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise LrquantError(f"{repository}: upload failed ({reason}); the result is in {folder}") from error
