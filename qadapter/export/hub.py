"""Send a folder with its card to a model hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qadapter.errors import QAdapterError

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def hub_token() -> str:
    """The token in the environment.

    Raises:
        QAdapterError: there is none.
    """
    for name in TOKENS:
        if token := os.environ.get(name, "").strip():
            return token
    raise QAdapterError(
        "no hub token in the environment; set HF_TOKEN to a token that may write (a token on the command line would be "
        "seen by others)"
    )


def check_repository(name: str) -> None:
    """Refuse a name that is no repository's.

    Raises:
        QAdapterError: it is not of the form owner/name.
    """
    if not re.fullmatch(r"[\w-]+/[\w.-]+", name):
        raise QAdapterError(f"{name!r} is no repository; expected owner/name")


def push_folder(folder: Path, repository: str, *, private: bool = True, revision: str | None = None) -> str:
    """Create a model repository if it is not there, and upload a folder to it in one commit.

    Args:
        folder: what to upload, the card with it.
        repository: owner/name.
        private: whether a new repository is private.
        revision: branch; the main one without it.

    Returns:
        The commit's address.

    Raises:
        QAdapterError: no token, no such place, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    check_repository(repository)
    api = HfApi(token=hub_token())
    try:
        api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            revision=revision,
            commit_message="Add the model and its card",
        )
    except OfflineModeIsEnabled as error:
        raise QAdapterError("HF_HUB_OFFLINE is set, so nothing can be sent; unset it to push") from error
    except HfHubHTTPError as error:
        reason = " ".join(str(error.server_message or error).split())[:300]
        raise QAdapterError(f"the hub refused {repository}: {reason}") from error
    except OSError as error:
        raise QAdapterError(f"the hub cannot be reached ({type(error).__name__}); {folder} was not sent") from error
    return str(done.commit_url)
