"""Export folders on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_lightning.errors import KDError
from kd_lightning.export.graph import reason


def push_to_hub(folder: Path, repository: str, private: bool = False, api: Any = None) -> str:
    """Upload an export folder as a model repository, which is made if it is not there.

    Args:
        folder: What `kd-export` wrote.
        repository: `USER/NAME`.
        private: Whether a repository that is made is private.
        api: A `huggingface_hub.HfApi`; None: one with the user's own login.

    Returns:
        The repository's address.

    Raises:
        KDError: The hub refuses, or cannot be reached. The folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = api or HfApi()
    try:
        place = api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=repository, folder_path=str(folder), repo_type="model")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise KDError(
            f"{folder} is written, but the hub did not take it as {repository}: {reason(error)} (log in with `hf auth "
            "login`)"
        ) from error
    return str(place)
