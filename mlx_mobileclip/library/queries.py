"""Queries: texts, images and filters, and cached text embeddings."""

import hashlib
import json
import math
import os
import re
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..paths import user_path
from .store import Store, is_within, relative

if TYPE_CHECKING:
    from ..models.clip import MobileCLIP
    from ..preprocess.processor import Processor

MAX_CACHED_TEXTS = 50_000  # text embeddings in an index; the oldest are evicted first
MAX_RECENT_TEXTS = 4096  # text embeddings in memory
TEXTS_PER_BATCH = 64
# Arguments of `load` recorded in an index.
OPTIONS = ("model", "variant", "revision", "dtype", "config", "preprocess")
DATE = re.compile(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?")
KM_PER_DEGREE = 111.2
EARTH_KM = 6371.0
# Falls back to the file's modification time if EXIF has no date.
TAKEN = (
    "coalesce(taken, strftime('%Y-%m-%dT%H:%M:%S', mtime_ns / 1000000000, 'unixepoch', "
    "'localtime'))"
)


@dataclass(frozen=True)
class Query:
    """Search terms and filters.

    Attributes:
        texts: Texts that photos must all match.
        like: Example images that photos must resemble.
        without: Texts that photos must not match.
        since: First day: YEAR, YEAR-MONTH or YEAR-MONTH-DAY.
        until: Last day, in the same forms.
        near: Latitude and longitude in degrees, and a distance in kilometres.
        camera: Part of the camera's name.
        folder: Folder that contains the photos.
        kinds: File suffixes, such as "jpg".
    """

    texts: Sequence[str] = ()
    like: Sequence[str | os.PathLike[str]] = ()
    without: Sequence[str] = ()
    since: str | None = None
    until: str | None = None
    near: tuple[float, float, float] | None = None
    camera: str | None = None
    folder: str | os.PathLike[str] | None = None
    kinds: Sequence[str] = field(default_factory=tuple)

    @property
    def name(self) -> str:
        """The query as a heading."""
        parts = [*self.texts, *(f"like {os.fspath(image)}" for image in self.like)]
        return " and ".join(parts) + "".join(f", not {text}" for text in self.without)


def first_day(text: str) -> date:
    """First day of a year, month or day; raises DataError if the text is not a date."""
    match = DATE.fullmatch(text)
    try:
        assert match
        return date(int(match[1]), int(match[2] or 1), int(match[3] or 1))
    except (AssertionError, ValueError) as error:
        raise DataError(
            f"{text[:40]!r} is not a date; write 2026, 2026-05 or 2026-05-01"
        ) from error


def day_after(text: str) -> date:
    """Day after the end of a year, month or day."""
    start, hyphens = first_day(text), text.count("-")
    if hyphens == 2:
        return start + timedelta(days=1)
    if hyphens == 1:
        return (start.replace(day=28) + timedelta(days=4)).replace(day=1)
    return start.replace(year=start.year + 1)


def filter_slots(store: Store, query: Query) -> NDArray[np.intp] | None:
    """Slots of the photos that pass all filters; None without filters."""
    conditions: list[str] = []
    values: list[Any] = []

    def add(condition: str, *params: Any) -> None:
        conditions.append(condition)
        values.extend(params)

    if query.since:
        add(f"{TAKEN} >= ?", first_day(query.since).isoformat())
    if query.until:
        add(f"{TAKEN} < ?", day_after(query.until).isoformat())
    if query.camera:
        add("instr(lower(camera), lower(?)) > 0", query.camera)
    if query.near:
        latitude, longitude, km = _check_near(query.near)
        add(
            "latitude BETWEEN ? AND ?", latitude - km / KM_PER_DEGREE, latitude + km / KM_PER_DEGREE
        )
        store.connection.create_function("km", 4, distance_km, deterministic=True)
        add("km(latitude, longitude, ?, ?) <= ?", latitude, longitude, km)
    if query.kinds:
        kinds = [kind.lower().lstrip(".") for kind in query.kinds]
        kinds += [
            {"jpg": "jpeg", "jpeg": "jpg", "tif": "tiff", "tiff": "tif"}.get(k, k) for k in kinds
        ]
        alternatives = " OR ".join("lower(CAST(path AS TEXT)) LIKE '%.' || ?" for _ in kinds)
        add(f"({alternatives})", *kinds)
    if query.folder is not None:
        add(*_folder_condition(store, query.folder))
    if not conditions:
        return None
    sql = f"SELECT slot FROM file WHERE slot IS NOT NULL AND {' AND '.join(conditions)}"
    return np.array([slot for (slot,) in store.rows(sql, *values)], np.intp)


def _folder_condition(store: Store, folder: str | os.PathLike[str]) -> tuple[Any, ...]:
    """SQL condition and values for the files in a folder."""
    path = os.fsencode(os.path.abspath(user_path(folder)))  # noqa: PTH100 (as for roots)
    for number, root in store.roots().items():
        if is_within(path, root):
            prefix = relative(path, root)
            if not prefix:
                return "root = ?", number
            start = prefix + b"/"
            return "root = ? AND substr(path, 1, ?) = ?", number, len(start), start
        if is_within(root, path):
            root_ids = [n for n, other in store.roots().items() if is_within(other, path)]
            return f"root IN ({', '.join('?' * len(root_ids))})", *root_ids
    raise DataError(f"{os.fspath(folder)}: is not in the index; run index on it first")


def _check_near(near: tuple[float, float, float]) -> tuple[float, float, float]:
    latitude, longitude, km = near
    if not (-90 <= latitude <= 90 and -180 <= longitude <= 180 and 0 < km < math.inf):
        raise DataError("near takes degrees north, degrees east and kilometres: 52.5,13.4,10")
    return latitude, longitude, km


def distance_km(a: float, b: float, latitude: float, longitude: float) -> float | None:
    """Great-circle distance in km between two points in degrees (haversine), or None."""
    if a is None or b is None:
        return None
    north, east = math.radians(latitude - a), math.radians(longitude - b)
    chord = (
        math.sin(north / 2) ** 2
        + math.cos(math.radians(a)) * math.cos(math.radians(latitude)) * math.sin(east / 2) ** 2
    )
    return 2 * EARTH_KM * math.asin(min(1.0, math.sqrt(chord)))


def text_tower_identity(model: "MobileCLIP", processor: "Processor") -> str:
    """Hash of all that text embeddings depend on: text tower and tokenizer."""
    from ..caching.fingerprint import fingerprint
    from ..embedding.pipeline import text_tower

    return fingerprint(text_tower(model)[0], model.config.text, processor.tokenizer.fingerprint)


class TextEmbeddings:
    """Text embeddings, cached in the index; the text tower is loaded on the first cache miss."""

    def __init__(self, store: Store, loaded: "tuple[MobileCLIP, Processor] | None" = None):
        self._store, self._loaded = store, loaded
        self._identity, self._dim = store.meta("text_identity"), store.meta("dim")
        self._recent: dict[str, NDArray[np.float16]] = {}

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return normalised text embeddings, float32 (N, E)."""
        if len(self._recent) > MAX_RECENT_TEXTS:
            self._recent.clear()
        self._fetch([text for text in dict.fromkeys(texts) if text not in self._recent])
        rows = np.stack([self._recent[text] for text in texts]).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def _fetch(self, texts: Sequence[str]) -> None:
        """Load text embeddings from the index, and compute those that are missing."""
        keys = {text: self._key(text) for text in texts}
        vectors = {
            text: vector for text, key in keys.items() if (vector := self._cached(key)) is not None
        }
        if missing := [text for text in keys if text not in vectors]:
            embeddings = self._embed(missing)
            vectors |= dict(zip(missing, embeddings, strict=True))
            self._write_cache([(keys[text], vectors[text].tobytes()) for text in missing])
        self._recent |= vectors

    def _key(self, text: str) -> bytes:
        if not self._identity:
            raise DataError(
                f"{self._store.path}: its model has no text tower; search with --like, or index "
                "with a model that has one"
            )
        return hashlib.sha256(f"{self._identity} {text}".encode()).digest()[:16]

    def _cached(self, key: bytes) -> NDArray[np.float16] | None:
        found = self._store.rows("SELECT vector FROM text WHERE key=?", key)
        if not found or len(found[0][0]) != 2 * self._dim:
            return None
        vector = np.frombuffer(found[0][0], np.float16)
        return vector if np.isfinite(vector).all() and vector.any() else None

    def _embed(self, texts: list[str]) -> NDArray[np.float16]:
        model, processor = self._loaded or load_index_model(self._store)
        self._loaded = model, processor
        batches = [
            np.asarray(model.encode_text(processor.texts(texts[i : i + TEXTS_PER_BATCH]), True))
            for i in range(0, len(texts), TEXTS_PER_BATCH)
        ]
        rows = np.concatenate(batches)
        if not np.isfinite(rows).all():
            raise DataError("the query's embedding is not finite; index with --dtype float32")
        return rows.astype(np.float16)

    def _write_cache(self, rows: list[tuple[bytes, bytes]]) -> None:
        """Write embeddings to the index, unless it is read-only or locked."""
        if not self._store.writable:
            return
        with suppress(DataError, sqlite3.Error), self._store.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO text VALUES(?, ?)", rows)
            connection.execute(
                "DELETE FROM text WHERE rowid <= (SELECT max(rowid) FROM text) - ?",
                (MAX_CACHED_TEXTS,),
            )


def load_index_model(store: Store, *, whole: bool = False) -> "tuple[MobileCLIP, Processor]":
    """Load the text tower of the index's model, or the whole model.

    Raises:
        DataError: the model has changed since the index was made.
    """
    from ..embedding.identity import image_identity
    from ..loader import load, load_text_tower

    options = recorded_options(store)
    name = options.pop("model")
    model, processor = (load if whole else load_text_tower)(name, **options)
    expected = store.meta("image_identity" if whole else "text_identity")
    actual = image_identity(model) if whole else text_tower_identity(model, processor)
    if actual != expected:
        raise DataError(
            f"{store.path}: {name} has changed since this index was made; run index with --rebuild"
        )
    return model, processor


def recorded_options(store: Store) -> dict[str, Any]:
    """Arguments of `load` for the index's model."""
    options: dict[str, Any] = {name: store.meta(name) or None for name in OPTIONS}
    if options["model"] is None:
        raise DataError(f"{store.path}: is empty; run index on a folder of photos")
    if text := options["preprocess"]:
        from ..json_fields import Fields
        from ..models.clip import PreprocessConfig

        try:
            options["preprocess"] = PreprocessConfig.from_json(Fields(json.loads(text), "index"))
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{store.path}: invalid preprocessing; index with --rebuild") from error
    return options
