"""Find a checkpoint: packaged, a local directory, or a Hugging Face repository in its cache.

Only named kinds of files are fetched, never Python or templates, and one commit is pinned for
all of them. This is the only place that touches the network.
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

DEMO = "demo"  # names the small model that comes with a package
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
# MobileCLIP's weights come under many names, often as both safetensors and PyTorch's pickles;
# the latter are fetched only where there are none of the former.
MOBILECLIP_FILES = ("config.json", "open_clip_config.json", "merges.txt", "LICENSE*", "NOTICE*")
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
TORCH_FILES = ("*.pt", "*.bin", "*.pth", "*.ckpt")
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin", ".pth", ".ckpt")
# CoCa: captioning models of this family, which have another architecture.
CAPTIONER = re.compile(r"mobileclip2?[_-]coca", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a checkpoint lies and what it is.

    Attributes:
        path: Directory with the files; a single file where `resolve_file` was given one.
        name: Repository id, "demo", or the path as given.
        revision: Commit of the repository; None for a local directory.
    """

    path: Path
    name: str
    revision: str | None = None

    @property
    def directory(self) -> Path:
        """Where its other files lie."""
        return self.path.parent if self.path.is_file() else self.path


def resolve(model: str | os.PathLike[str], revision: str | None, demo: Path) -> Checkpoint:
    """Turn what the user typed into a FastVLM checkpoint's directory.

    Args:
        model: `org/name` is always a repository on the Hub, and `demo` always the packaged model,
            so that a directory planted under such a name is never picked up; anything else is a
            local directory, `./demo` for one.
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
    path, is_directory, is_file = look(name)
    if is_file and path.suffix == ".zip":
        raise CheckpointError(f"{name}: is a zip file; unpack it first: unzip {name}")
    if not is_directory:
        what = "is a file, not a directory" if is_file else "no such directory"
        raise CheckpointError(
            f"{name}: {what}; give a checkpoint's directory or a repository such as "
            f"apple/FastVLM-0.5B{_meant(name, PUBLISHED_FASTVLM)}"
        )
    _refuse_adapter(path, name)
    return Checkpoint(path, name)


def resolve_file(model: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Like `resolve`, for MobileCLIP: a single file of weights is a checkpoint as well.

    Raises:
        CheckpointError: no such file or directory, or the repository is neither cached nor
            reachable.
    """
    if model == DEMO:
        return _packaged(DEMO_DIRECTORY, revision)
    name = os.fspath(model)
    _refuse_captioner(name)
    published = _published_mobileclips()
    of_weights = Path(name).suffix in WEIGHT_SUFFIXES
    if is_repository(model) and not of_weights:
        return _fetch(name, revision, _download_mobileclip, DEMO_DIRECTORY, published)
    path, is_directory, is_file = look(name)
    if is_directory or (is_file and of_weights):
        _refuse_adapter(path, name)
        return Checkpoint(path, name)
    what = f"is no {', '.join(WEIGHT_SUFFIXES)} file" if is_file else "no such file"
    raise CheckpointError(
        f"{name}: {what}; give a checkpoint's file or directory, or a repository such as "
        f"apple/MobileCLIP2-S0{_meant(name, published)}"
    )


def is_repository(model: str | os.PathLike[str]) -> bool:
    """Whether this names a repository on the Hub rather than something local.

    What exists here and is no directory is never one, nor is what would lie in a directory here,
    unless that is called like a publisher: such names stay on this machine.
    """
    if not isinstance(model, str) or not REPOSITORY.fullmatch(model) or model[0] == ".":
        return False
    if os.path.lexists(model):
        return os.path.isdir(model)  # noqa: PTH112 (never raises)
    parent = model.partition("/")[0]
    return parent in OWNERS or not os.path.isdir(parent)  # noqa: PTH112


def look(name: str) -> tuple[Path, bool, bool]:
    """A local path, whether it is a directory, and whether it is a file."""
    if not name:
        raise CheckpointError("the name of the checkpoint is empty; write . for this directory")
    try:
        path = user_path(name)
        return path, path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # no access; NUL
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{name[:200]!r}: cannot be read ({reason})") from error


def packages_here(checkpoint: Checkpoint) -> list[str]:
    """Names of the Core ML packages in a checkpoint's directory."""
    names = [p.name for p in checkpoint.directory.iterdir() if p.suffix == PACKAGE_SUFFIX]
    return sorted(name for name in names if name[0] != ".")


def packages_on_the_hub(name: str, revision: str | None) -> list[str]:
    """Names of the Core ML packages of a repository; none if it is local or out of reach."""
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
    """The directory of a checkpoint's Core ML package, fetched if need be; None if it has none.

    Raises:
        CheckpointError: the package is neither cached nor reachable.
    """
    path = checkpoint.directory / name
    files = tuple(f"{name}/{part}" for part in PACKAGE_PARTS)
    whole = all((checkpoint.directory / file).is_file() for file in files)
    if checkpoint.revision is None or whole:
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
    """Refuse what LoRA training saves by itself; the model it belongs to is not among it."""
    directory = path.parent if path.is_file() else path
    weights = [p.name for p in directory.glob("*.safetensors")]
    if any((directory / a).is_file() for a in ADAPTERS) and set(weights) <= {*ADAPTERS}:
        raise CheckpointError(
            f"{name}: is a LoRA adapter without its model; merge it first (merge_and_unload() of "
            "PEFT) and give the merged checkpoint"
        )


def _published_mobileclips() -> tuple[str, ...]:
    from ..models.variants import VARIANTS  # imports models that FastVLM does without

    return (DEMO, *(f"apple/{variant}" for variant in VARIANTS))


def _meant(name: str, published: tuple[str, ...]) -> str:
    """What may have been meant by a name that is not found, for the end of a message."""
    if name in published:
        return ""
    names = {known.lower(): known for known in published}
    names |= {known.lower().partition("/")[2]: known for known in published if "/" in known}
    found = get_close_matches(name.lower(), names, 1, cutoff=0.7)
    return f"; did you mean {names[found[0]]}?" if found else ""


def _packaged(directory: Path, revision: str | None) -> Checkpoint:
    if revision is not None:
        raise CheckpointError(
            f"{DEMO}: comes with this package in one revision; leave out --revision"
        )
    if not directory.is_dir():
        raise CheckpointError(f"{DEMO}: this installation has none ({directory} is missing)")
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
        """The client leaves its bars open, and tqdm would redraw them over later output."""

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            bars.append(self)

    try:
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(ignored),
            tqdm_class=ClosedBar,
        )
    finally:
        for bar in bars:
            bar.close()
    return Path(found)


def _download_fastvlm(name: str, revision: str | None) -> Path:
    path = _snapshot(name, revision, FILES)
    _refuse_adapter(path, name)
    # Without network this is whatever the cache holds, which may be half a download.
    read_json(path / "config.json")
    tensor_files(path)
    return path


def _download_mobileclip(name: str, revision: str | None) -> Path:
    path = _snapshot(name, revision, (*MOBILECLIP_FILES, *SAFETENSORS))
    if not any(path.glob("*.safetensors")):
        path = _snapshot(name, path.name, TORCH_FILES)  # both halves from one commit
    suffixes = {p.suffix for p in path.iterdir()}
    # Core ML packages are fetched later, once the variant is known.
    if not suffixes & {*WEIGHT_SUFFIXES, PACKAGE_SUFFIX} and not packages_on_the_hub(
        name, path.name
    ):
        raise CheckpointError("it holds no weights")
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

    meant = _meant(name, published)
    local = f", or write ./{name} for the directory here" if look(name)[1] else ""
    try:
        path = download(name, revision)
    except GatedRepoError as error:
        raise CheckpointError(f"{name}: gated; accept its terms on huggingface.co") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such repository, or a private one; check the name, or run: hf auth "
            f"login{local}{meant}"
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
            f"connect and run the command again to download it{local}{alternative}{meant}"
        ) from error
    except ModelError as error:
        raise CheckpointError(
            f"{name}: holds no checkpoint that can be used ({str(error)[:200]}); choose another "
            "repository, or if you are offline, connect and run the command again"
        ) from error
    except Exception as error:  # each release of the client has its own transport errors
        raise CheckpointError(
            f"{name}: the download is incomplete ({str(error)[:200]}); "
            "connect and run the command again"
        ) from error
    return Checkpoint(path, name, path.name)
