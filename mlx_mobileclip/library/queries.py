"""Queries: texts, images and filters, and their vectors, which the index keeps."""

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

MAX_KEPT_TEXTS = 50_000  # vectors of texts in an index; the oldest go first
MAX_RECENT_TEXTS = 4096  # in memory
TEXTS_PER_BATCH = 64
# Arguments of `load` that an index records.
OPTIONS = ("model", "variant", "revision", "dtype", "config", "preprocess")
DATE = re.compile(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?")
KM_PER_DEGREE = 111.2
EARTH_KM = 6371.0
# A photo without a date in its EXIF data counts by the time of its file.
TAKEN = (
    "coalesce(taken, strftime('%Y-%m-%dT%H:%M:%S', mtime_ns / 1000000000, 'unixepoch', "
    "'localtime'))"
)


@dataclass(frozen=True)
class Query:
    """What a search asks for.

    Attributes:
        texts: All of them must be shown.
        like: Images to be similar to.
        without: Texts that must not be shown.
        since: First day: YEAR, YEAR-MONTH or YEAR-MONTH-DAY.
        until: Last day, in the same forms.
        near: Latitude and longitude in degrees, and a distance in kilometres.
        camera: Part of the camera's name.
        folder: Only within this folder.
        kinds: Suffixes of files, such as "jpg".
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
        """The query in words, for headings."""
        parts = [*self.texts, *(f"like {os.fspath(image)}" for image in self.like)]
        return " and ".join(parts) + "".join(f", not {text}" for text in self.without)


def first_day(text: str) -> date:
    """The first day of a year, a month or a day; raises DataError if there is none."""
    match = DATE.fullmatch(text)
    try:
        assert match
        return date(int(match[1]), int(match[2] or 1), int(match[3] or 1))
    except (AssertionError, ValueError) as error:
        raise DataError(
            f"{text[:40]!r} is not a date; write 2026, 2026-05 or 2026-05-01"
        ) from error


def day_after(text: str) -> date:
    """The day after a year, a month or a day."""
    start, parts = first_day(text), text.count("-")
    if parts == 2:
        return start + timedelta(days=1)
    if parts == 1:
        return (start.replace(day=28) + timedelta(days=4)).replace(day=1)
    return start.replace(year=start.year + 1)


def filter_slots(store: Store, query: Query) -> NDArray[np.intp] | None:
    """Slots of the photos that pass the filters; None if there is no filter."""
    conditions: list[str] = []
    values: list[Any] = []

    def add(condition: str, *new: Any) -> None:
        conditions.append(condition)
        values.extend(new)

    if query.since:
        add(f"{TAKEN} >= ?", first_day(query.since).isoformat())
    if query.until:
        add(f"{TAKEN} < ?", day_after(query.until).isoformat())
    if query.camera:
        add("instr(lower(camera), lower(?)) > 0", query.camera)
    if query.near:
        latitude, longitude, km = _place(query.near)
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
        tests = " OR ".join("lower(CAST(path AS TEXT)) LIKE '%.' || ?" for _ in kinds)
        add(f"({tests})", *kinds)
    if query.folder is not None:
        add(*_within(store, query.folder))
    if not conditions:
        return None
    sql = f"SELECT slot FROM file WHERE slot IS NOT NULL AND {' AND '.join(conditions)}"
    return np.array([slot for (slot,) in store.rows(sql, *values)], np.intp)


def _within(store: Store, folder: str | os.PathLike[str]) -> tuple[Any, ...]:
    """Condition and values for the files within a folder."""
    path = os.fsencode(os.path.abspath(user_path(folder)))  # noqa: PTH100 (as roots are kept)
    for number, root in store.roots().items():
        if is_within(path, root):
            prefix = relative(path, root)
            if not prefix:
                return "root = ?", number
            start = prefix + b"/"
            return "root = ? AND substr(path, 1, ?) = ?", number, len(start), start
        if is_within(root, path):
            inside = [n for n, other in store.roots().items() if is_within(other, path)]
            return f"root IN ({', '.join('?' * len(inside))})", *inside
    raise DataError(f"{os.fspath(folder)}: is not in the index; run index on it first")


def _place(near: tuple[float, float, float]) -> tuple[float, float, float]:
    latitude, longitude, km = near
    if not (-90 <= latitude <= 90 and -180 <= longitude <= 180 and 0 < km < math.inf):
        raise DataError("near takes degrees north, degrees east and kilometres: 52.5,13.4,10")
    return latitude, longitude, km


def distance_km(a: float, b: float, latitude: float, longitude: float) -> float | None:
    """Distance on a sphere between two places in degrees (haversine); None if one is unknown."""
    if a is None or b is None:
        return None
    north, east = math.radians(latitude - a), math.radians(longitude - b)
    chord = (
        math.sin(north / 2) ** 2
        + math.cos(math.radians(a)) * math.cos(math.radians(latitude)) * math.sin(east / 2) ** 2
    )
    return 2 * EARTH_KM * math.asin(min(1.0, math.sqrt(chord)))


def text_tower_identity(model: "MobileCLIP", processor: "Processor") -> str:
    """Hash of what the vectors of texts depend on: tower and tokenizer."""
    from ..caching.fingerprint import fingerprint
    from ..embedding.pipeline import text_tower

    return fingerprint(text_tower(model)[0], model.config.text, processor.tokenizer.fingerprint)


class TextVectors:
    """Vectors of texts: those that the index keeps, else by the text tower, loaded at first use."""

    def __init__(self, store: Store, loaded: "tuple[MobileCLIP, Processor] | None" = None):
        self._store, self._loaded = store, loaded
        self._identity, self._dim = store.meta("text_identity"), store.meta("dim")
        self._recent: dict[str, NDArray[np.float16]] = {}

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors of texts, float32 (N, E)."""
        if len(self._recent) > MAX_RECENT_TEXTS:
            self._recent.clear()
        self._find([text for text in dict.fromkeys(texts) if text not in self._recent])
        rows = np.stack([self._recent[text] for text in texts]).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def _find(self, texts: Sequence[str]) -> None:
        """Read or compute the vectors of texts."""
        keys = {text: self._key(text) for text in texts}
        vectors = {
            text: vector for text, key in keys.items() if (vector := self._kept(key)) is not None
        }
        if missing := [text for text in keys if text not in vectors]:
            new = self._embed(missing)
            vectors |= dict(zip(missing, new, strict=True))
            self._keep([(keys[text], vectors[text].tobytes()) for text in missing])
        self._recent |= vectors

    def _key(self, text: str) -> bytes:
        if not self._identity:
            raise DataError(
                f"{self._store.path}: its model has no text tower; search with --like, or index "
                "with a model that has both towers"
            )
        return hashlib.sha256(f"{self._identity} {text}".encode()).digest()[:16]

    def _kept(self, key: bytes) -> NDArray[np.float16] | None:
        found = self._store.rows("SELECT vector FROM text WHERE key=?", key)
        if not found or len(found[0][0]) != 2 * self._dim:
            return None
        vector = np.frombuffer(found[0][0], np.float16)
        return vector if np.isfinite(vector).all() and vector.any() else None

    def _embed(self, texts: list[str]) -> NDArray[np.float16]:
        model, processor = self._loaded or load_recorded(self._store)
        self._loaded = model, processor
        parts = [
            np.asarray(model.encode_text(processor.texts(texts[i : i + TEXTS_PER_BATCH]), True))
            for i in range(0, len(texts), TEXTS_PER_BATCH)
        ]
        rows = np.concatenate(parts)
        if not np.isfinite(rows).all():
            raise DataError("the query's embedding is not finite; index with --dtype float32")
        return rows.astype(np.float16)

    def _keep(self, rows: list[tuple[bytes, bytes]]) -> None:
        """Keep vectors in the index; on a read-only volume, or while another writes, do without."""
        if not self._store.writable:
            return
        with suppress(DataError, sqlite3.Error), self._store.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO text VALUES(?, ?)", rows)
            connection.execute(
                "DELETE FROM text WHERE rowid <= (SELECT max(rowid) FROM text) - ?",
                (MAX_KEPT_TEXTS,),
            )


def load_recorded(store: Store, *, whole: bool = False) -> "tuple[MobileCLIP, Processor]":
    """Load the text tower that an index was made with, or the whole model.

    Raises:
        DataError: the model is not the same any more.
    """
    from ..embedding.identity import image_identity
    from ..loader import load, load_text_tower

    options = recorded_options(store)
    name = options.pop("model")
    model, processor = (load if whole else load_text_tower)(name, **options)
    recorded = store.meta("image_identity" if whole else "text_identity")
    now = image_identity(model) if whole else text_tower_identity(model, processor)
    if now != recorded:
        raise DataError(
            f"{store.path}: {name} is not the model any more that it was made with; run index "
            "with --rebuild"
        )
    return model, processor


def recorded_options(store: Store) -> dict[str, Any]:
    """The arguments of `load` for the model that an index was made with."""
    options: dict[str, Any] = {name: store.meta(name) or None for name in OPTIONS}
    if options["model"] is None:
        raise DataError(f"{store.path}: is empty; run index on a folder of photos")
    if text := options["preprocess"]:
        from ..json_fields import Fields
        from ..models.clip import PreprocessConfig

        try:
            options["preprocess"] = PreprocessConfig.from_json(Fields(json.loads(text), "index"))
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{store.path}: its preprocessing is damaged; run --rebuild") from error
    return options
