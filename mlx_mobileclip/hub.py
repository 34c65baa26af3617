"""Find a checkpoint: a local directory, or a Hugging Face repository fetched into its cache.

Only named kinds of files are fetched, never Python or templates, and one commit is pinned for
all of them. This is the only place that touches the network.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import read_json, tensor_files
from .errors import CheckpointError, ModelError

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
# MobileCLIP's weights come under many names, often as both safetensors and PyTorch's pickles;
# the latter are fetched only where there are none of the former.
MOBILECLIP_FILES = ("config.json", "open_clip_config.json", "LICENSE*", "NOTICE*")
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
TORCH_FILES = ("*.pt", "*.bin")
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a checkpoint lies and what it is.

    Attributes:
        path: Directory with the files; a single file where `resolve_file` was given one.
        name: Repository id, or the path as given.
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
    path = Path(name).expanduser()
    if path.suffix == ".zip" and path.is_file():
        raise CheckpointError(f"{name}: is a zip file; unpack it first: unzip {name}")
    if not path.is_dir():
        what = "is a file, not a directory" if path.exists() else "no such directory"
        raise CheckpointError(
            f"{name}: {what}; give a checkpoint's directory or a repository such as "
            "apple/FastVLM-0.5B"
        )
    return Checkpoint(path, name)


def resolve_file(model: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Like `resolve`, for MobileCLIP: a single file of weights is a checkpoint as well.

    Raises:
        CheckpointError: no such file or directory, or the repository is neither cached nor
            reachable.
    """
    name = os.fspath(model)
    path = Path(name).expanduser()
    if isinstance(model, str) and REPOSITORY.fullmatch(name) and not name.startswith("."):
        if path.suffix not in WEIGHT_SUFFIXES:
            return _fetch(name, revision, mobileclip=True)
        if not path.is_file():
            raise CheckpointError(
                f"{name}: no such file; for one file of a repository, download it first"
            )
    if path.is_file() and path.suffix in WEIGHT_SUFFIXES:
        return Checkpoint(path, name)
    if not path.is_dir():
        what = f"is no {', '.join(WEIGHT_SUFFIXES)} file" if path.exists() else "no such file"
        raise CheckpointError(
            f"{name}: {what}; give a checkpoint's file or directory, or a repository such as "
            "apple/MobileCLIP2-S0"
        )
    return Checkpoint(path, name)


def _download(name: str, revision: str | None, mobileclip: bool) -> Path:
    from huggingface_hub import snapshot_download

    if not mobileclip:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
        # Without network this is whatever the cache holds, which may be half a download.
        read_json(path / "config.json")
        tensor_files(path)
        return path
    wanted = [*MOBILECLIP_FILES, *SAFETENSORS]
    path = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    if not any(path.glob("*.safetensors")):
        commit = path.name  # both halves from one commit
        path = Path(snapshot_download(name, revision=commit, allow_patterns=list(TORCH_FILES)))
    if not any(p.suffix in WEIGHT_SUFFIXES for p in path.iterdir()):
        raise CheckpointError("it holds no weights")
    return path


def _fetch(name: str, revision: str | None, *, mobileclip: bool = False) -> Checkpoint:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = _download(name, revision, mobileclip)
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
    except (HfHubHTTPError, OSError, ModelError) as error:
        raise CheckpointError(
            f"{name}: the download is incomplete ({str(error)[:200]}); "
            "connect and run the command again"
        ) from error
    return Checkpoint(path, name, path.name)
