"""Export folders on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_lightning.export.graph import reason
from kd_lightning.runtime.errors import ConfigError, KDError


def check_repository(name: str) -> None:
    """Refuse an invalid repository name before anything is exported.

    Raises:
        ConfigError: It is not `USER/NAME`.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {name}: {reason(error)}") from error
    if "/" not in name:
        raise ConfigError(f"--push-to-hub {name}: expected USER/NAME")


def push_to_hub(folder: Path, repository: str, private: bool = False, api: Any = None) -> str:
    """Upload an export folder as a model repository, created if it does not exist.

    Args:
        folder: What `kd-export` wrote.
        repository: `USER/NAME`.
        private: Whether a new repository is private.
        api: A `huggingface_hub.HfApi`; None: one with the user's own login.

    Returns:
        The repository's address.

    Raises:
        KDError: The hub refuses or cannot be reached. The folder is unchanged.
    """
    from huggingface_hub import HfApi

    api = api or HfApi()
    try:
        place = api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=repository, folder_path=str(folder), repo_type="model")
    except Exception as error:  # offline, an error of the hub client's HTTP library
        raise KDError(
            f"{folder} is written, but not uploaded to the hub as {repository}: {reason(error)} (log in with `hf auth "
            "login`)"
        ) from error
    return str(place)
