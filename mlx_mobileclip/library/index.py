"""Bring the index up to date: embed what is new or changed, and drop what is gone."""

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
from .near_duplicates import look
from .queries import text_tower_identity
from .scan import VANISHED_SHARE, Found, Source, Stamp, scan
from .store import Photo, Store, absolute, relative

HASHED_AT_ONCE = 64
MAX_REASON = 200  # characters of an error that are kept
MAX_NAME = 200  # characters of a name in a message


@dataclass
class IndexSummary:
    """What a run of `index` did.

    Attributes:
        embedded: Files that went through the model.
        reused: Files whose content was known, under this or another name.
        unchanged: Files that were up to date.
        dropped: Files that were removed from the index because they are gone.
        kept: Files that are gone, but kept because too many are.
        errors: Reasons why files could not be read, by path.
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
    """Record the model of an index, or check that it is the recorded one.

    Args:
        store: The index.
        model: The model that embeds.
        processor: Its processor.
        options: What loads the model again: `model`, `variant` and so on.
        rebuild: Forget all vectors if the model is another one.

    Raises:
        DataError: the index was made with other weights or other preprocessing.
    """
    identity = image_identity(model)
    recorded = store.meta("image_identity")
    if recorded not in (None, identity):
        if not rebuild:
            raise DataError(
                f"{store.path}: was made with {store.meta('model')}, and the weights, dtype or "
                f"preprocessing of {options['model']} are others; use that model, another --index, "
                "or --rebuild to embed everything again"
            )
        store.forget_vectors()
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
    """Index folders and files; every finished batch is kept, whatever happens afterwards.

    Args:
        store: The index, with its model recorded by `bind_model`.
        model: The model that embeds.
        processor: Its processor.
        sources: What to index.
        exclude: Globs of what to leave out; what was indexed before and is excluded now is
            dropped.
        drop_missing: Drop files that are gone even if they are more than a fifth of a folder's.
        retry: Try files again that could not be read before.
        batch_size: Images per forward pass.
        workers: Decoding threads; by default one per core, at most 8.
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
        known = store.known(root, under)
        here = {relative(path, root_path): stamp for path, stamp in found.stamps.items()}
        pending = {
            path: stamp
            for path, stamp in here.items()
            if path not in known
            or not known[path].is_current(stamp)
            or (retry and known[path].error)
        }
        summary.unchanged += len(here) - len(pending)
        run = _Run(store, model, processor, root, root_path, pending, summary)
        with Bar(len(here), "photos", quiet=quiet, done=len(here) - len(pending)) as bar:
            if found.ignored and not quiet:
                bar.say(str(found.ignored))
            for name, reason in found.unreadable.items():
                bar.say(f"skipped {name}: {reason}")
            run.embed_all(bar, batch_size, workers or min(MAX_WORKERS, os.cpu_count() or 1))
            gone = [file.id for path, file in known.items() if path not in here]
            _drop_gone(store, source, found, gone, len(known), drop_missing, summary, bar)
    return summary


def _drop_gone(
    store: Store,
    source: Source,
    found: Found,
    gone: list[int],
    count: int,
    drop_missing: bool,
    summary: IndexSummary,
    bar: Bar,
) -> None:
    """Drop files that are gone, unless there are so many that a disk may not be mounted."""
    moved = set(store.moved(gone))
    missing = [number for number in gone if number not in moved]
    name = os.fsdecode(source.path)
    unsure = not found.is_there or bool(found.unreadable) or len(missing) > VANISHED_SHARE * count
    if missing and unsure and not drop_missing:
        summary.kept += len(missing)
        bar.say(
            f"{name}: {len(missing)} of {count} photos are gone, and stay in the index in case a "
            "disk is not mounted; --drop-missing drops them"
        )
        missing = []
    dropped = [*moved, *missing]
    if dropped:
        store.drop(dropped)
    summary.dropped += len(missing)


class _Run:
    """The embedding of what is pending in one root."""

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
        self.photos: dict[str, Photo] = {}  # being embedded, by absolute path

    def embed_all(self, bar: Bar, batch_size: int, workers: int) -> None:
        def encode(pixels: mx.array) -> mx.array:
            return self.model.encode_image(pixels, normalize=True)

        with ThreadPoolExecutor(workers) as pool:
            names = self._unknown(pool, bar)
            results = embed_prepared(names, self._prepare, encode, batch_size, workers)
            with closing(results), closing(names):
                while batch := list(islice(results, batch_size)):
                    self._keep(batch, bar)

    def _unknown(self, pool: ThreadPoolExecutor, bar: Bar) -> Generator[str, None, None]:
        """Absolute paths whose content has no vector yet; the others are copied."""
        remaining = iter(self.pending.items())
        while part := list(islice(remaining, HASHED_AT_ONCE)):
            digests = pool.map(
                lambda item: file_hash(absolute(self.root_path, item[0]), item[1]), part
            )
            copies: list[tuple[Photo, NDArray[np.float16] | None]] = []
            unknown = []
            for (path, stamp), digest in zip(part, digests, strict=True):
                same = self.store.copy_of(digest) if digest else None
                if same is None:
                    name = os.fsdecode(absolute(self.root_path, path))
                    self.photos[name] = Photo(path, stamp, digest)
                    unknown.append(name)
                else:
                    photo, slot = same
                    photo.path, photo.stamp = path, stamp
                    copies.append((photo, self.store.vector(slot, self.dim)))
            if copies:
                self.store.put(self.root, *_columns(copies))
                self.summary.reused += len(copies)
                bar.advance(len(copies))
            yield from unknown

    def _prepare(self, name: str) -> NDArray[np.float32]:
        """Decode a file in a thread, and note what the index keeps of it."""
        photo = self.photos[name]
        if photo.stamp is None:
            raise DataError("is not a file, or no permission")

        def shrink(image: Image.Image) -> Image.Image:
            photo.width, photo.height = image.size
            return resized(image, self.processor.preprocess)

        small = open_resized(name, shrink)
        photo.look = look(small)
        with suppress(Exception), Image.open(name) as image:  # checked above
            photo.metadata = read_metadata(image)
        return normalized(small, self.processor.preprocess)

    def _keep(self, batch: Sequence[Embedded], bar: Bar) -> None:
        rows: list[tuple[Photo, NDArray[np.float16] | None]] = []
        for item in batch:
            photo = self.photos.pop(item.name)
            if item.row is None:
                photo.error = _reason(item.name, item.error)
                self.summary.errors[item.name] = photo.error
                bar.say(f"{item.name[:MAX_NAME]}: {photo.error}")
            rows.append((photo, None if item.row is None else item.row.astype(np.float16)))
        self.store.put(self.root, *_columns(rows))
        self.summary.embedded += sum(vector is not None for _, vector in rows)
        bar.advance(len(batch))


def _columns(rows: Iterable[tuple[Photo, Any]]) -> tuple[list[Photo], list[Any]]:
    photos, vectors = zip(*rows, strict=True)
    return list(photos), list(vectors)


def _reason(name: str, error: ModelError | None) -> str:
    """The message of an error without the path, which the index knows."""
    return str(error).removeprefix(f"{name}: ").removeprefix(f"{name} ")[:MAX_REASON]
