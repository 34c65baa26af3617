"""Find a checkpoint: packaged, a local directory, or a Hugging Face repository in its cache.

Only listed file types are downloaded, never Python or templates, and all from one commit. This is
the only module that uses the network.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ModelError
from ..json_fields import read_json
from ..paths import user_path
from .core_ml.package import PARTS as PACKAGE_PARTS
from .core_ml.package import SUFFIX as PACKAGE_SUFFIX
from .safetensors import tensor_files

DEMO = "demo"  # name of the small model included in a package
DEMO_DIRECTORY = Path(__file__).parents[1] / DEMO
OWNERS = ("apple", "timm")  # of the published models
PUBLISHED_FASTVLM = (DEMO, *(f"apple/FastVLM-{size}" for size in ("0.5B", "1.5B", "7B")))
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
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
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)
# MobileCLIP's weights have many names, and often exist both as safetensors and as PyTorch files;
# the latter are downloaded only if there are no safetensors.
MOBILECLIP_FILES = ("config.json", "open_clip_config.json", "merges.txt", "LICENSE*", "NOTICE*")
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
TORCH_FILES = ("*.pt", "*.bin", "*.pth", "*.ckpt")
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin", ".pth", ".ckpt")
# CoCa: captioning models of this family, with another architecture.
CAPTIONER = re.compile(r"mobileclip2?[_-]coca", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Location and identity of a checkpoint.

    Attributes:
        path: Directory of the files, or a single file from `resolve_file`.
        name: Repository id, "demo", or the path as given.
        revision: Commit of the repository; None for a local directory.
    """

    path: Path
    name: str
    revision: str | None = None

    @property
    def directory(self) -> Path:
        """Directory of its other files."""
        return self.path.parent if self.path.is_file() else self.path


def resolve(model: str | os.PathLike[str], revision: str | None, demo: Path) -> Checkpoint:
    """Find the directory of a FastVLM checkpoint, downloading it if necessary.

    Args:
        model: `org/name` is always a repository on the Hub and `demo` the packaged model, so that
            a local directory of such a name is never used by accident; anything else is a local
            directory, such as `./demo`.
        revision: Branch, tag or commit of the repository.
        demo: Directory of the packaged model.

    Raises:
        CheckpointError: no such directory, or the repository is neither cached nor reachable.
    """
    if model == DEMO:
        return _packaged(demo, revision)
    name = os.fspath(model)
    _refuse_captioner(name)
    if is_repository(model):
        return _fetch(name, revision, _download_fastvlm, demo, PUBLISHED_FASTVLM)
    path, is_directory, is_file = inspect_path(name)
    if is_file and path.suffix == ".zip":
        raise CheckpointError(f"{name}: is a zip file; unpack it first: unzip {name}")
    if not is_directory:
        what = "is a file, not a directory" if is_file else "no such directory"
        raise CheckpointError(
            f"{name}: {what}; give a checkpoint's directory or a repository such as "
            f"apple/FastVLM-0.5B{_suggestion(name, PUBLISHED_FASTVLM)}"
        )
    _refuse_adapter(path, name)
    return Checkpoint(path, name)


def resolve_file(model: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Like `resolve`, for MobileCLIP; the checkpoint may be a single weights file.

    Raises:
        CheckpointError: no such file or directory, or the repository is neither cached nor
            reachable.
    """
    if model == DEMO:
        return _packaged(DEMO_DIRECTORY, revision)
    name = os.fspath(model)
    _refuse_captioner(name)
    published = _published_mobileclips()
    is_weights_file = Path(name).suffix in WEIGHT_SUFFIXES
    if is_repository(model) and not is_weights_file:
        return _fetch(name, revision, _download_mobileclip, DEMO_DIRECTORY, published)
    path, is_directory, is_file = inspect_path(name)
    if is_directory or (is_file and is_weights_file):
        _refuse_adapter(path, name)
        return Checkpoint(path, name)
    what = f"is not a {', '.join(WEIGHT_SUFFIXES)} file" if is_file else "no such file"
    raise CheckpointError(
        f"{name}: {what}; give a checkpoint's file or directory, or a repository such as "
        f"apple/MobileCLIP2-S0{_suggestion(name, published)}"
    )


def is_repository(model: str | os.PathLike[str]) -> bool:
    """Whether this is a repository on the Hub, not a local path.

    Names of existing files, and of missing ones in an existing directory, are local and never sent
    to the Hub, unless the directory has the name of a publisher.
    """
    if not isinstance(model, str) or not REPOSITORY.fullmatch(model) or model[0] == ".":
        return False
    if os.path.lexists(model):
        return os.path.isdir(model)  # noqa: PTH112 (never raises)
    parent = model.partition("/")[0]
    return parent in OWNERS or not os.path.isdir(parent)  # noqa: PTH112


def inspect_path(name: str) -> tuple[Path, bool, bool]:
    """Return a local path, whether it is a directory, and whether it is a file."""
    if not name:
        raise CheckpointError("the name of the checkpoint is empty; write . for this directory")
    try:
        path = user_path(name)
        return path, path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{name[:200]!r}: cannot be read ({reason})") from error


def local_packages(checkpoint: Checkpoint) -> list[str]:
    """Names of the Core ML packages in a checkpoint's directory."""
    names = [p.name for p in checkpoint.directory.iterdir() if p.suffix == PACKAGE_SUFFIX]
    return sorted(name for name in names if name[0] != ".")


def hub_packages(name: str, revision: str | None) -> list[str]:
    """Names of the Core ML packages of a repository; empty if it is local or not reachable."""
    if revision is None:
        return []
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except Exception:  # noqa: BLE001 (each release of the client has its own transport errors)
        return []
    tops = {file.partition("/")[0] for file in files}
    return sorted(top for top in tops if top.endswith(PACKAGE_SUFFIX))


def fetch_package(checkpoint: Checkpoint, name: str) -> Path | None:
    """The directory of a Core ML package, downloaded if necessary; None if it does not exist.

    Raises:
        CheckpointError: the package is neither cached nor reachable.
    """
    path = checkpoint.directory / name
    files = tuple(f"{name}/{part}" for part in PACKAGE_PARTS)
    complete = all((checkpoint.directory / file).is_file() for file in files)
    if checkpoint.revision is None or complete:
        return path if os.path.lexists(path) else None

    def download(_: str, revision: str | None) -> Path:
        return _snapshot(checkpoint.name, revision, files, ignored=()) / name

    where = f"{checkpoint.name}/{name}"
    fetched = _fetch(where, checkpoint.revision, download, DEMO_DIRECTORY).path
    return fetched if fetched.is_dir() else None


def _refuse_captioner(name: str) -> None:
    if CAPTIONER.search(Path(name).name):
        raise CheckpointError(
            f"{name}: is a captioner (CoCa), which is not supported; take apple/FastVLM-0.5B to "
            "describe images, or apple/MobileCLIP2-S0 to compare them with texts"
        )


def _refuse_adapter(path: Path, name: str) -> None:
    """Refuse a LoRA adapter that comes without its base model."""
    directory = path.parent if path.is_file() else path
    weights = [p.name for p in directory.glob("*.safetensors")]
    if any((directory / a).is_file() for a in ADAPTERS) and set(weights) <= {*ADAPTERS}:
        raise CheckpointError(
            f"{name}: is a LoRA adapter without its base model; merge it first (PEFT's "
            "merge_and_unload()) and give the merged checkpoint"
        )


def _published_mobileclips() -> tuple[str, ...]:
    from ..models.variants import VARIANTS  # not at the top: FastVLM does not need these models

    return (DEMO, *(f"apple/{variant}" for variant in VARIANTS))


def _suggestion(name: str, published: tuple[str, ...]) -> str:
    """The end of a message on an unknown name: the nearest known one, if any."""
    if name in published:
        return ""
    names = {known.lower(): known for known in published}
    names |= {known.lower().partition("/")[2]: known for known in published if "/" in known}
    matches = get_close_matches(name.lower(), names, 1, cutoff=0.7)
    return f"; did you mean {names[matches[0]]}?" if matches else ""


def _packaged(directory: Path, revision: str | None) -> Checkpoint:
    if revision is not None:
        raise CheckpointError(
            f"{DEMO}: is part of this package and has no revisions; leave out --revision"
        )
    if not directory.is_dir():
        raise CheckpointError(f"{DEMO}: is not part of this installation ({directory} is missing)")
    return Checkpoint(directory, DEMO)


def _snapshot(
    name: str,
    revision: str | None,
    patterns: tuple[str, ...],
    ignored: tuple[str, ...] = ("*.py", "*/*"),
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    bars: list[tqdm] = []

    class ClosedBar(tqdm):
        """Closed below; tqdm redraws the client's open bars over later output."""

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            bars.append(self)

    try:
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(ignored),
            tqdm_class=ClosedBar,
        )
    finally:
        for bar in bars:
            bar.close()
    return Path(path)


def _download_fastvlm(name: str, revision: str | None) -> Path:
    path = _snapshot(name, revision, FILES)
    _refuse_adapter(path, name)
    # Without network this is what the cache has, possibly an incomplete download.
    read_json(path / "config.json")
    tensor_files(path)
    return path


def _download_mobileclip(name: str, revision: str | None) -> Path:
    path = _snapshot(name, revision, (*MOBILECLIP_FILES, *SAFETENSORS))
    if not any(path.glob("*.safetensors")):
        path = _snapshot(name, path.name, TORCH_FILES)  # all files from one commit
    suffixes = {p.suffix for p in path.iterdir()}
    # Core ML packages are downloaded later, when the variant is known.
    if not suffixes & {*WEIGHT_SUFFIXES, PACKAGE_SUFFIX} and not hub_packages(name, path.name):
        raise CheckpointError("it has no weights")
    return path


def _fetch(
    name: str,
    revision: str | None,
    download: Callable[[str, str | None], Path],
    demo: Path,
    published: tuple[str, ...] = (),
) -> Checkpoint:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    suggestion = _suggestion(name, published)
    local = f", or write ./{name} for the directory here" if inspect_path(name)[1] else ""
    try:
        path = download(name, revision)
    except GatedRepoError as error:
        raise CheckpointError(f"{name}: gated; accept its terms on huggingface.co") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such repository, or a private one; check the name, or run: hf auth "
            f"login{local}{suggestion}"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: has no revision {revision!r}") from error
    except HFValidationError as error:
        raise CheckpointError(f"{name}: not a valid repository name ({error})") from error
    except LocalEntryNotFoundError as error:
        offline = "; or try --model demo, a small model that comes with this package"
        alternative = offline if demo.is_dir() else ""
        raise CheckpointError(
            f"{name}: not in the cache, and huggingface.co cannot be reached; "
            f"connect and run the command again to download it{local}{alternative}{suggestion}"
        ) from error
    except ModelError as error:
        raise CheckpointError(
            f"{name}: has no usable checkpoint ({str(error)[:200]}); choose another "
            "repository, or if you are offline, connect and run the command again"
        ) from error
    except Exception as error:  # each release of the client has its own transport errors
        raise CheckpointError(
            f"{name}: the download is incomplete ({str(error)[:200]}); "
            "connect and run the command again"
        ) from error
    return Checkpoint(path, name, path.name)
