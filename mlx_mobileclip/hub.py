"""Find a checkpoint: a local directory, or a Hugging Face repository fetched into its cache.

Only named kinds of files are fetched, never Python or templates, and one commit is pinned for
all of them. This is the only place that touches the network.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import read_json, tensor_files
from .errors import CheckpointError

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILES = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a checkpoint lies and what it is.

    Attributes:
        path: Directory with the files.
        name: Repository id, or the directory as given.
        revision: Commit of the repository; None for a local directory.
    """

    path: Path
    name: str
    revision: str | None = None


def resolve(model: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Turn what the user typed into a checkpoint directory.

    Args:
        model: `org/name` is always a repository on the Hub, so that a directory planted under
            that name is never picked up; anything else is a local directory.
        revision: Branch, tag or commit of the repository.

    Raises:
        CheckpointError: no such directory, or the repository is neither cached nor reachable.
    """
    name = os.fspath(model)
    if isinstance(model, str) and REPOSITORY.fullmatch(name) and not name.startswith("."):
        return _fetch(name, revision)
    try:
        path = Path(name).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # no access; NUL; ~ of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{name[:200]!r}: cannot be read ({reason})") from error
    if is_file and path.suffix == ".zip":
        raise CheckpointError(f"{name}: is a zip file; unpack it first: unzip {name}")
    if not is_directory:
        what = "is a file, not a directory" if is_file else "no such directory"
        raise CheckpointError(
            f"{name}: {what}; give a checkpoint's directory or a repository such as "
            "apple/FastVLM-0.5B"
        )
    return Checkpoint(path, name)


def _fetch(name: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(FILES), ignore_patterns=["*.py", "*/*"]
            )
        )
        # Without network this is whatever the cache holds, which may be half a download.
        read_json(path / "config.json")
        tensor_files(path)
    except GatedRepoError as error:
        raise CheckpointError(f"{name}: gated; accept its terms on huggingface.co") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such repository, or a private one; check the name, or run: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: has no revision {revision!r}") from error
    except HFValidationError as error:
        raise CheckpointError(f"{name}: not a valid repository name ({error})") from error
    except LocalEntryNotFoundError as error:
        local = f", or write ./{name} for the directory here" if Path(name).is_dir() else ""
        raise CheckpointError(
            f"{name}: not in the cache, and huggingface.co cannot be reached; "
            f"connect and run the command again to download it{local}"
        ) from error
    except Exception as error:  # each release of the client has its own transport errors
        raise CheckpointError(
            f"{name}: the download is incomplete ({str(error)[:200]}); "
            "connect and run the command again"
        ) from error
    return Checkpoint(path, name, path.name)
