"""Search results: a sequence of matches, with exports to lists, pandas and HTML."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from .html import grid, page
from .match import FIELDS, Match

MAX_IN_NOTEBOOK = 60  # thumbnails


class SearchResults(Sequence[Match]):
    """Matching photos, the best first.

    Attributes:
        query: The query as text.
        total: Number of relevant photos, of which at most k are included.
        photos: Number of photos in the library.
        calibrated: Whether irrelevant photos were left out; small libraries only rank.
        nearest: The nearest photo, if none is relevant.
    """

    def __init__(
        self,
        query: str,
        matches: Sequence[Match],
        *,
        total: int,
        photos: int,
        calibrated: bool,
        nearest: Match | None = None,
    ):
        self.query, self.total, self.photos = query, total, photos
        self.calibrated, self.nearest = calibrated, nearest
        self._matches = tuple(matches)

    @property
    def paths(self) -> list[str]:
        """Absolute paths."""
        return [match.path for match in self._matches]

    def to_list(self) -> list[dict[str, Any]]:
        """One dictionary per photo."""
        return [match.to_dict() for match in self._matches]

    def to_pandas(self) -> Any:
        """DataFrame with one row per photo; needs pandas."""
        import pandas as pd

        frame = pd.DataFrame(self.to_list(), columns=FIELDS)
        frame["taken"] = pd.to_datetime(frame["taken"])
        return frame

    def to_html(self) -> str:
        """Self-contained HTML page with thumbnails."""
        return page(self.query, self._matches, self.summary())

    def summary(self) -> str:
        """One-line summary."""
        if not self._matches:
            nearest = f"; nearest: {Path(self.nearest.path).name}" if self.nearest else ""
            return f"no photo shows this ({self.photos} searched{nearest})"
        if not self.calibrated:
            return f"{len(self)} of {self.photos} photos, without a relevance threshold"
        more = f", of which {len(self)} are listed" if self.total > len(self) else ""
        return f"{self.total} of {self.photos} photos{more}"

    def _repr_html_(self) -> str:
        return grid(self._matches[:MAX_IN_NOTEBOOK], self.summary())

    def __repr__(self) -> str:
        return f"<SearchResults {self.query!r}: {self.summary()}>"

    def __len__(self) -> int:
        return len(self._matches)

    def __iter__(self) -> Iterator[Match]:
        return iter(self._matches)

    @overload
    def __getitem__(self, index: int) -> Match: ...

    @overload
    def __getitem__(self, index: slice) -> "SearchResults": ...

    def __getitem__(self, index: int | slice) -> "Match | SearchResults":
        if isinstance(index, int):
            return self._matches[index]
        return SearchResults(
            self.query,
            self._matches[index],
            total=self.total,
            photos=self.photos,
            calibrated=self.calibrated,
            nearest=self.nearest,
        )
