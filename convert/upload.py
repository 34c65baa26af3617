"""Push a converted checkpoint to the Hugging Face Hub."""

import shlex
from pathlib import Path

from mlx_mobileclip.checkpoints.hub import is_repository
from mlx_mobileclip.errors import CheckpointError, ConfigError


def check_repository(name: str) -> None:
    """Check before the conversion what would make the upload fail.

    Raises:
        ConfigError: it is not the name of a repository, or there is no token of Hugging Face.
    """
    from huggingface_hub import get_token

    if not is_repository(name):
        raise ConfigError(f"--upload-repo {name[:80]}: is no repository; write it like you/model")
    if get_token() is None:
        raise ConfigError("--upload-repo needs a token of Hugging Face; run: hf auth login")


def upload(directory: Path, name: str) -> str:
    """Push a directory to a repository, which is created if need be.

    Args:
        directory: A complete checkpoint.
        name: Of the repository, `org/name`.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the upload has failed; the directory is complete.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        message = "Upload converted checkpoint"
        commit = api.upload_folder(repo_id=name, folder_path=directory, commit_message=message)
    except Exception as error:  # each release of the client has its own transport errors
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        denied = "your token may not write there" if status in (401, 403) else "not uploaded"
        reason = " ".join(str(error).split())[:200]
        again = shlex.join(["hf", "upload", name, str(directory)])
        raise CheckpointError(
            f"{name}: {denied} ({reason}); {directory} is complete, push it with: {again}"
        ) from error
    return str(commit.commit_url)
