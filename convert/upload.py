"""Push a converted checkpoint to the Hugging Face Hub."""

import shlex
from pathlib import Path

from mlx_mobileclip.checkpoints.hub import is_repository
from mlx_mobileclip.errors import CheckpointError, ConfigError


def check_repository(name: str) -> None:
    """Check before the conversion that the upload can work.

    Raises:
        ConfigError: the name is not a repository's, or there is no Hugging Face token.
    """
    from huggingface_hub import get_token

    if not is_repository(name):
        raise ConfigError(f"--upload-repo {name[:80]}: not a repository; write it like you/model")
    if get_token() is None:
        raise ConfigError("--upload-repo needs a Hugging Face token; run: hf auth login")


def upload(directory: Path, name: str) -> str:
    """Push a directory to a repository, which is created if it does not exist.

    Args:
        directory: A complete checkpoint.
        name: Name of the repository, `org/name`.

    Returns:
        The URL of the commit.

    Raises:
        CheckpointError: the upload failed; the directory remains complete.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        message = "Upload converted checkpoint"
        commit = api.upload_folder(repo_id=name, folder_path=directory, commit_message=message)
    except Exception as error:  # transport errors differ between releases of the client
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        denied = "your token may not write there" if status in (401, 403) else "not uploaded"
        reason = " ".join(str(error).split())[:200]
        again = shlex.join(["hf", "upload", name, str(directory)])
        raise CheckpointError(
            f"{name}: {denied} ({reason}); {directory} is complete, push it with: {again}"
        ) from error
    return str(commit.commit_url)
