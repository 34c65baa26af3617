"""Read the lines of a text file; an error names the line that is not text."""

import os
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from pathlib import Path

from ..errors import DataError
from ..paths import user_path

# Byte order marks and their encodings; UTF-32 first, because its mark begins like UTF-16's.
BYTE_ORDER_MARKS = (
    (BOM_UTF32_LE, ""),
    (BOM_UTF32_BE, ""),
    (BOM_UTF8, "utf-8"),
    (BOM_UTF16_LE, "utf-16-le"),
    (BOM_UTF16_BE, "utf-16-be"),
)
MAX_BYTES = 256 << 20  # 2.5 million paths of 100 characters
FIRST_BLOCK_BYTES = 1 << 16
LINE_END = re.compile(r"\r\n|\r|\n")


def read_lines(path: str | os.PathLike[str], *, paths: bool = False) -> list[str]:
    """Read the lines of a UTF-8 file, or of a UTF-16 file with a byte order mark.

    Args:
        path: Text file. Lines end with LF, CRLF or CR.
        paths: The lines are paths, which need not be UTF-8: invalid bytes become surrogates, as
            in `os.fsdecode`.

    Raises:
        DataError: the file cannot be read or is larger than 256 MB, or a line is not valid text
            in these encodings.
    """
    try:
        data = _read(user_path(path))
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason})") from error
    mark, encoding = next((m for m in BYTE_ORDER_MARKS if data.startswith(m[0])), (b"", "utf-8"))
    if not encoding:
        raise DataError(f"{path}: line 1 is UTF-32; save the file as UTF-8")
    data = data[len(mark) :]
    lenient = paths and encoding == "utf-8"
    try:
        text = data.decode(encoding, "surrogateescape" if lenient else "strict")
    except UnicodeDecodeError as error:
        number = len(LINE_END.split(data[: error.start].decode(encoding, "ignore")))
        name = encoding[:6].upper().rstrip("-")
        raise DataError(
            f"{path}: line {number} is not {name} (byte 0x{data[error.start]:02X}); save the file "
            "as UTF-8"
        ) from error
    # Concatenated files contain further byte order marks.
    lines = [line.removeprefix("\ufeff") for line in LINE_END.split(text)]
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise DataError(
                f"{path}: line {number} contains a NUL, so it is not text, or is UTF-16 without a "
                "byte order mark; save the file as UTF-8"
            )
    if not lines[-1]:
        lines.pop()
    return lines


def _read(path: Path) -> bytes:
    """Read a text file; stop after the first block if that shows it is not text."""
    with path.open("rb") as file:
        start = file.read(FIRST_BLOCK_BYTES)
        if b"\0" in start and not start.startswith(tuple(mark for mark, _ in BYTE_ORDER_MARKS)):
            return start
        data = start + file.read(MAX_BYTES - len(start) + 1)
    if len(data) > MAX_BYTES:
        raise DataError(f"{path}: larger than {MAX_BYTES >> 20} MB; split it")
    return data
