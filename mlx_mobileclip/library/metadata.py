"""Date, camera and location from EXIF data, which may be wrong or hostile."""

import math
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from PIL import Image

MAKE, MODEL, DATE = 0x010F, 0x0110, 0x0132  # tags of the first IFD
EXIF_IFD, GPS_IFD = 0x8769, 0x8825
DATE_ORIGINAL, DATE_DIGITIZED = 0x9003, 0x9004
LATITUDE_REF, LATITUDE, LONGITUDE_REF, LONGITUDE = 1, 2, 3, 4
MAX_CAMERA = 80  # characters
DATE_FORMAT = re.compile(r"(\d{4}):(\d\d):(\d\d)[ T](\d\d):(\d\d):(\d\d)")


@dataclass(frozen=True, slots=True)
class Metadata:
    """EXIF metadata of a photo.

    Attributes:
        taken: Local time, such as "2026-05-01T12:30:00".
        camera: Make and model.
        latitude: Degrees north, -90 to 90.
        longitude: Degrees east, -180 to 180.
    """

    taken: str | None = None
    camera: str | None = None
    latitude: float | None = None
    longitude: float | None = None


def read_metadata(image: Image.Image) -> Metadata:
    """Read the EXIF data of an open image; missing and invalid values are None."""
    try:
        exif = image.getexif()
        details, gps = exif.get_ifd(EXIF_IFD), exif.get_ifd(GPS_IFD)
    except Exception:  # noqa: BLE001 (Pillow raises almost anything on damaged EXIF data)
        return Metadata()
    dates = (details.get(DATE_ORIGINAL), details.get(DATE_DIGITIZED), exif.get(DATE))
    latitude = _degrees(gps.get(LATITUDE), gps.get(LATITUDE_REF), "S", 90)
    longitude = _degrees(gps.get(LONGITUDE), gps.get(LONGITUDE_REF), "W", 180)
    if latitude is None or longitude is None:
        latitude = longitude = None
    return Metadata(
        taken=next((date for value in dates if (date := _date(value))), None),
        camera=_camera(exif.get(MAKE), exif.get(MODEL)),
        latitude=latitude,
        longitude=longitude,
    )


def _date(value: Any) -> str | None:
    match = DATE_FORMAT.match(_text(value))
    try:
        text = "{}-{}-{}T{}:{}:{}".format(*match.groups()) if match else ""
        return datetime.fromisoformat(text).isoformat()
    except ValueError:  # missing, or invalid such as 0000:00:00
        return None


def _camera(make: Any, model: Any) -> str | None:
    make_name, model_name = _text(make), _text(model)
    if model_name.lower().startswith(make_name.lower().partition(" ")[0]):
        make_name = ""  # "Canon" and "Canon EOS R5"
    return f"{make_name} {model_name}".strip()[:MAX_CAMERA] or None


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else ""
    return "".join(c for c in text[:1000] if c.isprintable()).strip()


def _degrees(dms: Any, reference: Any, negative_reference: str, limit: int) -> float | None:
    """Convert degrees, minutes and seconds to signed degrees; None if invalid."""
    try:
        degrees, minutes, seconds = (float(part) for part in dms)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    value = degrees + minutes / 60 + seconds / 3600
    if not math.isfinite(value) or not 0 <= value <= limit:
        return None
    return -value if _text(reference).upper().startswith(negative_reference) else value
