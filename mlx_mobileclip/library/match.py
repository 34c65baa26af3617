"""A single search result."""

from dataclasses import dataclass
from typing import Any

FIELDS = (
    *("path", "relevance", "score", "taken", "camera", "latitude", "longitude", "width", "height"),
    "size",
)


@dataclass(frozen=True, slots=True)
class Match:
    """A photo found by a search.

    Attributes:
        path: Absolute path; bytes that are not UTF-8 are surrogates, as in `os.fsdecode`.
        relevance: z-score, calibrated for this query and library.
        score: Cosine similarity to the first text or image of the query, -1 to 1.
        taken: Local time from its EXIF data, such as "2026-05-01T12:30:00".
        camera: Make and model.
        latitude: Degrees north.
        longitude: Degrees east.
        width: In pixels, upright.
        height: In pixels, upright.
        size: File size in bytes.
        hash: Content hash, 16 bytes.
        look: Perceptual hash, 64 bits.
    """

    path: str
    relevance: float
    score: float
    taken: str | None = None
    camera: str | None = None
    latitude: float | None = None
    longitude: float | None = None
    width: int | None = None
    height: int | None = None
    size: int | None = None
    hash: bytes | None = None
    look: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields except the hashes, as JSON values."""
        values = {name: getattr(self, name) for name in FIELDS}
        values["relevance"], values["score"] = round(self.relevance, 3), round(self.score, 4)
        return values
