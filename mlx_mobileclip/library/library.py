"""`Library`: the photo library, for Python and the commands."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..defaults import DEFAULT_MODEL
from ..errors import DataError
from ..paths import user_path
from .maintenance import Problem, find_duplicates, relocate, status, verify
from .queries import Query, TextEmbeddings, recorded_options
from .results import SearchResults
from .scan import Source, as_source
from .search import search
from .store import Store, is_within
from .vectors import Vectors

if TYPE_CHECKING:
    from ..models.clip import MobileCLIP, PreprocessConfig
    from ..preprocess.processor import Processor
    from .index import IndexSummary


class Library:
    """A photo library, stored in one index file."""

    def __init__(self, path: str | os.PathLike[str] | None = None):
        """Use this index file, by default the user's. It is opened on first use."""
        self._path = None if path is None else user_path(path)
        self._store: Store | None = None
        self._vectors: tuple[int, Vectors] | None = None
        self._text_embeddings: TextEmbeddings | None = None
        self._loaded_model: tuple[dict[str, Any], tuple[MobileCLIP, Processor]] | None = None

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index file; it is reopened when needed."""
        if self._store is not None:
            self._store.close()
        self._store = self._vectors = self._text_embeddings = None

    @property
    def path(self) -> Path:
        """The index file."""
        from .schema import default_index

        return self._path or default_index()

    def index(
        self,
        paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] = (),
        *,
        model: str | os.PathLike[str] | None = None,
        variant: str | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        preprocess: "PreprocessConfig | None" = None,
        config: str | os.PathLike[str] | None = None,
        exclude: Sequence[str] = (),
        drop_missing: bool = False,
        retry: bool = False,
        rebuild: bool = False,
        batch_size: int = 32,
        workers: int | None = None,
        quiet: bool = True,
    ) -> "IndexSummary":
        """Embed new and changed photos of folders and files, and remove missing ones.

        Args:
            paths: Folders and images; by default all folders of the index.
            model: As for `load`; by default the index's model, or the default of `load`.
            variant: As for `load`.
            revision: As for `load`.
            dtype: As for `load`.
            preprocess: As for `load`.
            config: As for `load`.
            exclude: Globs of names, or of paths within a folder, to exclude.
            drop_missing: Remove missing files even if they are more than a fifth of a folder.
            retry: Retry files that could not be read before.
            rebuild: Embed everything again if the model has changed.
            batch_size: Images per forward pass.
            workers: Decoding threads; by default one per core, up to 8.
            quiet: Do not show progress on stderr; unreadable files are still reported.

        Raises:
            DataError: the index or a path cannot be used, or the model differs.
            ModelError: the model cannot be loaded.
        """
        from ..embedding.pipeline import check_batch_size
        from ..loader import load
        from .index import bind_model, update_index

        check_batch_size(batch_size)
        names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        sources = [as_source(name) for name in names]
        store = self._open(create=True)
        sources = sources or [Source(root) for root in store.roots().values()]
        if not sources:
            raise DataError(f"{self.path}: is empty; give a folder of photos to index")
        _check_sources(store, sources)
        options: dict[str, Any] = {
            "model": model or DEFAULT_MODEL,
            "variant": variant,
            "revision": revision,
            "dtype": dtype,
            "config": config,
            "preprocess": preprocess,
        }
        if model is None and store.meta("model"):
            options = recorded_options(store)
        if self._loaded_model is None or self._loaded_model[0] != options:
            load_options = dict(options)
            self._loaded_model = options, load(load_options.pop("model"), **load_options)
        loaded = self._loaded_model[1]
        bind_model(store, *loaded, _recordable(options), rebuild=rebuild)
        self._vectors = self._text_embeddings = None
        return update_index(
            store,
            *loaded,
            sources,
            exclude=exclude,
            drop_missing=drop_missing,
            retry=retry,
            batch_size=batch_size,
            workers=workers,
            quiet=quiet,
        )

    def search(
        self,
        text: str | None = None,
        *,
        like: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] = (),
        also: Sequence[str] | str = (),
        without: Sequence[str] | str = (),
        since: str | None = None,
        until: str | None = None,
        near: tuple[float, float, float] | None = None,
        camera: str | None = None,
        folder: str | os.PathLike[str] | None = None,
        kinds: Sequence[str] | str = (),
        k: int = 20,
        sort: str = "relevance",
        dedupe: bool = False,
        everything: bool = False,
    ) -> SearchResults:
        """Find photos by texts, images and filters.

        Args:
            text: What the photos show.
            like: Example images that they must resemble.
            also: Texts that they must also show.
            without: Texts that they must not show.
            since: First day, as YEAR, YEAR-MONTH or YEAR-MONTH-DAY.
            until: Last day, in the same forms.
            near: Degrees north, degrees east, and a distance in kilometres.
            camera: Part of the camera's name.
            folder: Folder that contains them.
            kinds: File suffixes, such as "jpg".
            k: Maximum number of photos.
            sort: "relevance", or "date" (newest first).
            dedupe: Omit near duplicates of a better match.
            everything: Return the k nearest photos, relevant or not.

        Returns:
            The relevant photos, possibly none. In a library of fewer than 30 photos, the k nearest.
            Without `text`, `also` and `like`, the newest k photos that pass the filters.

        Raises:
            DataError: the index or an argument cannot be used.
            ImageError: an image cannot be read.
        """
        store = self._open()
        query = Query(
            texts=[*([text] if text is not None else []), *_as_list(also)],
            like=_as_list(like),
            without=_as_list(without),
            since=since,
            until=until,
            near=near,
            camera=camera,
            folder=folder,
            kinds=_as_list(kinds),
        )
        self._text_embeddings = self._text_embeddings or TextEmbeddings(store)
        return search(
            store,
            self._current_vectors(),
            self._text_embeddings,
            query,
            k=k,
            sort=sort,
            dedupe=dedupe,
            everything=everything,
        )

    def duplicates(
        self, level: str = "near", *, threshold: float = 0.95, quiet: bool = True
    ) -> list[list[str]]:
        """Find groups of duplicate photos.

        Args:
            level: "exact" (identical files), "near" (the same picture, re-encoded or resized), or
                "similar" (cosine similarity of at least `threshold`).
            threshold: Minimum cosine similarity for "similar", -1 to 1.
            quiet: Do not show progress on stderr.

        Returns:
            The paths of each group, the largest picture first.
        """
        return find_duplicates(
            self._open(), self._current_vectors(), level, threshold=threshold, quiet=quiet
        )

    def status(self) -> dict[str, Any]:
        """Return the index's model, folders, counts, errors and size."""
        return status(self._open())

    def verify(self, *, files: bool = False) -> list[Problem]:
        """Check the index; with `files`, also check that photos are unchanged."""
        return verify(self._open(), files=files)

    def relocate(self, old: str | os.PathLike[str], new: str | os.PathLike[str]) -> int:
        """Update the path of a moved folder; returns the number of its files."""
        return relocate(self._open(), user_path(old), user_path(new))

    def export(self, output: str | os.PathLike[str]) -> int:
        """Export the index to a new Parquet file; returns the number of rows."""
        from .export import export

        return export(self._open(), self._current_vectors(), user_path(output))

    def _open(self, *, create: bool = False) -> Store:
        if self._store is None:
            self._store = Store(self.path, create=create)
        elif create and not self._store.writable:
            raise DataError(f"{self.path}: cannot be written; choose another index")
        return self._store

    def _current_vectors(self) -> Vectors:
        """The vectors in memory, reloaded after another process has written."""
        store = self._open()
        [(version,)] = store.rows("PRAGMA data_version")
        if self._vectors is None or self._vectors[0] != version:
            dim = store.meta("dim")
            if dim is None:
                raise DataError(f"{self.path}: is empty; run index on a folder of photos")
            self._vectors = version, Vectors(store.connection, dim)
        return self._vectors[1]


def _as_list(values: Any) -> list[Any]:
    return [values] if isinstance(values, (str, os.PathLike)) else list(values)


def _check_sources(store: Store, sources: Sequence[Source]) -> None:
    """Reject a path that neither exists nor is in the index: probably a typo."""
    roots = [*store.roots().values()]
    for source in sources:
        path = Path(os.fsdecode(source.path))
        if not path.exists() and not any(is_within(source.path, root) for root in roots):
            raise DataError(f"{path}: no such folder or file; give a folder of photos, or an image")


def _recordable(options: dict[str, Any]) -> dict[str, str | None]:
    """Options of `load` as strings, with absolute paths."""
    result = {name: None if v is None else os.fspath(v) if name != "preprocess" else
              json.dumps(asdict(v)) for name, v in options.items()}  # fmt: skip
    for name in ("model", "config"):
        text = result[name]
        with suppress(OSError):
            if text and text != "demo" and user_path(text).exists():
                result[name] = str(user_path(text).absolute())
    return result
