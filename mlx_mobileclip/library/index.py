"""Update the index: embed new and changed photos, remove missing ones."""

import os
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..embedding.identity import image_identity
from ..embedding.pipeline import MAX_WORKERS, Embedded, embed_prepared
from ..errors import DataError, ModelError
from ..models.clip import MobileCLIP
from ..preprocess.image import open_resized
from ..preprocess.processor import Processor, normalized, resized
from ..terminal import Bar
from .file_hash import file_hash
from .metadata import read_metadata
from .near_duplicates import difference_hash
from .queries import text_tower_identity
from .scan import MAX_MISSING_SHARE, ScanResult, Source, Stamp, scan
from .store import Photo, Store, absolute, relative

HASH_BATCH = 64
MAX_REASON = 200  # characters of a stored error
MAX_NAME = 200  # characters of a name in a message


@dataclass
class IndexSummary:
    """Counts of an `index` run.

    Attributes:
        embedded: Files embedded by the model.
        reused: Files whose content was already indexed under some path.
        unchanged: Files already up to date.
        dropped: Missing files that were removed from the index.
        kept: Missing files that were kept because there are too many.
        errors: Reason for each unreadable file, by path.
    """

    embedded: int = 0
    reused: int = 0
    unchanged: int = 0
    dropped: int = 0
    kept: int = 0
    errors: dict[str, str] = field(default_factory=dict)


def bind_model(
    store: Store,
    model: MobileCLIP,
    processor: Processor,
    options: dict[str, str | None],
    *,
    rebuild: bool = False,
) -> None:
    """Record the index's model, or check that it matches the recorded one.

    Args:
        store: The index.
        model: The model that embeds.
        processor: Its processor.
        options: Arguments of `load` for this model.
        rebuild: Delete all vectors if the model differs.

    Raises:
        DataError: the index was made with other weights or preprocessing.
    """
    identity = image_identity(model)
    recorded = store.meta("image_identity")
    if recorded not in (None, identity):
        if not rebuild:
            raise DataError(
                f"{store.path}: was made with {store.meta('model')}, and {options['model']} has "
                "other weights, dtype or preprocessing; use that model, another --index, or "
                "--rebuild to embed everything again"
            )
        store.delete_vectors()
    text = text_tower_identity(model, processor) if model.text is not None else ""
    settings = {name: value or "" for name, value in options.items()}
    dim = model.config.embed_dim
    store.set_meta(**settings, image_identity=identity, text_identity=text, dim=dim)


def update_index(
    store: Store,
    model: MobileCLIP,
    processor: Processor,
    sources: Sequence[Source],
    *,
    exclude: Sequence[str] = (),
    drop_missing: bool = False,
    retry: bool = False,
    batch_size: int = 32,
    workers: int | None = None,
    quiet: bool = True,
) -> IndexSummary:
    """Index folders and files; each finished batch is committed.

    Args:
        store: The index, with its model recorded by `bind_model`.
        model: The model that embeds.
        processor: Its processor.
        sources: Folders and files to index.
        exclude: Globs of files to exclude; excluded files already in the index are removed.
        drop_missing: Remove missing files even if they are more than a fifth of a folder.
        retry: Retry files that could not be read before.
        batch_size: Images per forward pass.
        workers: Decoding threads; by default one per core, up to 8.
        quiet: Do not show progress.

    Raises:
        DataError: the index cannot be written.
    """
    summary = IndexSummary()
    for source in sources:
        folder = os.path.dirname(source.path) if source.is_file else source.path  # noqa: PTH120
        root, root_path = store.root_for(folder)
        found = scan(source, exclude)
        under = relative(source.path, root_path)
        indexed_files = store.indexed_files(root, under)
        current = {relative(path, root_path): stamp for path, stamp in found.stamps.items()}
        pending = {
            path: stamp
            for path, stamp in current.items()
            if path not in indexed_files
            or not indexed_files[path].is_current(stamp)
            or (retry and indexed_files[path].error)
        }
        summary.unchanged += len(current) - len(pending)
        indexer = _RootIndexer(store, model, processor, root, root_path, pending, summary)
        with Bar(len(current), "photos", quiet=quiet, done=len(current) - len(pending)) as bar:
            if found.ignored and not quiet:
                bar.say(str(found.ignored))
            for name, reason in found.unreadable.items():
                bar.say(f"skipped {name}: {reason}")
            indexer.embed_all(bar, batch_size, workers or min(MAX_WORKERS, os.cpu_count() or 1))
            absent = [file.id for path, file in indexed_files.items() if path not in current]
            _drop_missing(
                store, source, found, absent, len(indexed_files), drop_missing, summary, bar
            )
    return summary


def _drop_missing(
    store: Store,
    source: Source,
    found: ScanResult,
    absent: list[int],
    count: int,
    drop_missing: bool,
    summary: IndexSummary,
    bar: Bar,
) -> None:
    """Remove missing files, unless so many are missing that a disk may not be mounted."""
    with_copies = set(store.with_copies(absent))
    missing = [number for number in absent if number not in with_copies]
    name = os.fsdecode(source.path)
    many = len(missing) > MAX_MISSING_SHARE * count
    maybe_unmounted = not found.exists or bool(found.unreadable) or many
    if missing and maybe_unmounted and not drop_missing:
        summary.kept += len(missing)
        bar.say(
            f"{name}: {len(missing)} of {count} photos are missing, and kept in the index as a "
            "disk may not be mounted; --drop-missing removes them"
        )
        missing = []
    dropped = [*with_copies, *missing]
    if dropped:
        store.drop(dropped)
    summary.dropped += len(missing)


class _RootIndexer:
    """Embeds the pending files of one root."""

    def __init__(
        self,
        store: Store,
        model: MobileCLIP,
        processor: Processor,
        root: int,
        root_path: bytes,
        pending: dict[bytes, Stamp | None],
        summary: IndexSummary,
    ):
        self.store, self.model, self.processor = store, model, processor
        self.root, self.root_path, self.pending = root, root_path, pending
        self.summary = summary
        self.dim = model.config.embed_dim
        self.photos: dict[str, Photo] = {}  # in progress, by absolute path

    def embed_all(self, bar: Bar, batch_size: int, workers: int) -> None:
        def encode(pixels: mx.array) -> mx.array:
            return self.model.encode_image(pixels, normalize=True)

        with ThreadPoolExecutor(workers) as pool:
            names = self._paths_to_embed(pool, bar)
            results = embed_prepared(names, self._prepare, encode, batch_size, workers)
            with closing(results), closing(names):
                while batch := list(islice(results, batch_size)):
                    self._store_batch(batch, bar)

    def _paths_to_embed(self, pool: ThreadPoolExecutor, bar: Bar) -> Generator[str, None, None]:
        """Yield absolute paths to embed; copy the vectors of content that is already indexed."""
        remaining = iter(self.pending.items())
        while part := list(islice(remaining, HASH_BATCH)):
            digests = pool.map(
                lambda item: file_hash(absolute(self.root_path, item[0]), item[1]), part
            )
            reused: list[tuple[Photo, NDArray[np.float16] | None]] = []
            to_embed = []
            for (path, stamp), digest in zip(part, digests, strict=True):
                indexed_copy = self.store.find_by_hash(digest) if digest else None
                if indexed_copy is None:
                    name = os.fsdecode(absolute(self.root_path, path))
                    self.photos[name] = Photo(path, stamp, digest)
                    to_embed.append(name)
                else:
                    photo, slot = indexed_copy
                    photo.path, photo.stamp = path, stamp
                    reused.append((photo, self.store.vector(slot, self.dim)))
            if reused:
                self.store.put(self.root, *_unzip(reused))
                self.summary.reused += len(reused)
                bar.advance(len(reused))
            yield from to_embed

    def _prepare(self, name: str) -> NDArray[np.float32]:
        """Decode a file in a worker thread and record its metadata."""
        photo = self.photos[name]
        if photo.stamp is None:
            raise DataError("is not a file, or permission is denied")

        def shrink(image: Image.Image) -> Image.Image:
            photo.width, photo.height = image.size
            return resized(image, self.processor.preprocess)

        small = open_resized(name, shrink)
        photo.perceptual_hash = difference_hash(small)
        with suppress(Exception), Image.open(name) as image:  # limits were checked by open_resized
            photo.metadata = read_metadata(image)
        return normalized(small, self.processor.preprocess)

    def _store_batch(self, batch: Sequence[Embedded], bar: Bar) -> None:
        rows: list[tuple[Photo, NDArray[np.float16] | None]] = []
        for item in batch:
            photo = self.photos.pop(item.name)
            if item.row is None:
                photo.error = _error_text(item.name, item.error)
                self.summary.errors[item.name] = photo.error
                bar.say(f"{item.name[:MAX_NAME]}: {photo.error}")
            rows.append((photo, None if item.row is None else item.row.astype(np.float16)))
        self.store.put(self.root, *_unzip(rows))
        self.summary.embedded += sum(vector is not None for _, vector in rows)
        bar.advance(len(batch))


def _unzip(rows: Iterable[tuple[Photo, Any]]) -> tuple[list[Photo], list[Any]]:
    photos, vectors = zip(*rows, strict=True)
    return list(photos), list(vectors)


def _error_text(name: str, error: ModelError | None) -> str:
    """Error message without the path, which the index stores separately."""
    return str(error).removeprefix(f"{name}: ").removeprefix(f"{name} ")[:MAX_REASON]
