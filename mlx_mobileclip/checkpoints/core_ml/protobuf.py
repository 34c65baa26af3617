"""Parse protobuf messages from untrusted input, without a schema.

A message is a list of fields, each a number and a value; the caller knows the types of values.
Messages are decoded lazily, and all messages of a file share a budget of fields, which bounds time
and memory.

Wire format: protobuf.dev, "Encoding".
"""

import struct

from ...errors import CheckpointError

MAX_FIELDS = 1_000_000  # in all decoded messages; FastViTHD's program has 66,000
MAX_VARINT_BYTES = 10
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
FIXED_BYTES = {FIXED64: 8, FIXED32: 4}


class Budget:
    """The number of fields that may still be read from one file.

    Attributes:
        where: Name of the file in messages.
        left: Number of fields left.
    """

    def __init__(self, where: str, left: int = MAX_FIELDS):
        self.where = where
        self.left = left

    def error(self, what: str) -> CheckpointError:
        """The error for a malformed file."""
        return CheckpointError(
            f"{self.where}: not a valid Core ML model ({what}); download it again"
        )


class Message:
    """One message: its fields by number, with the values as stored."""

    def __init__(self, data: memoryview, budget: Budget):
        """Parse the fields of `data`; raises CheckpointError if it is not a message."""
        self._budget = budget
        self._fields: dict[int, list[int | memoryview]] = {}
        at = 0
        while at < len(data):
            budget.left -= 1
            if budget.left < 0:
                raise CheckpointError(
                    f"{budget.where}: has more than {MAX_FIELDS} fields; no known model does"
                )
            key, at = _varint(data, at, budget)
            kind = key & 7
            value: int | memoryview
            if kind == VARINT:
                value, at = _varint(data, at, budget)
            else:
                if kind == BYTES:
                    size, at = _varint(data, at, budget)
                elif kind in FIXED_BYTES:
                    size = FIXED_BYTES[kind]
                else:
                    raise budget.error(f"wire type {kind}")
                if size > len(data) - at:
                    raise budget.error(f"a field of {size} bytes, {len(data) - at} are left")
                value, at = data[at : at + size], at + size
            self._fields.setdefault(key >> 3, []).append(value)

    def has(self, field: int) -> bool:
        """Whether the field exists."""
        return field in self._fields

    def number(self, field: int) -> int:
        """The unsigned integer of a field, 0 if it is missing."""
        value = self._fields.get(field, [0])[-1]
        if not isinstance(value, int):
            raise self._budget.error(f"field {field} is not a number")
        return value

    def data(self, field: int) -> memoryview:
        """The bytes of a field, none if it is missing."""
        return self._all(field)[-1] if field in self._fields else memoryview(b"")

    def text(self, field: int) -> str:
        """The text of a field, empty if it is missing."""
        return self._decoded(self.data(field))

    def texts(self, field: int) -> list[str]:
        """All texts of a repeated field."""
        return [self._decoded(value) for value in self._all(field)]

    def message(self, field: int) -> "Message":
        """The message of a field, empty if it is missing."""
        return Message(self.data(field), self._budget)

    def messages(self, field: int) -> list["Message"]:
        """All messages of a repeated field."""
        return [Message(value, self._budget) for value in self._all(field)]

    def map(self, field: int) -> dict[str, "Message"]:
        """The messages of a map with string keys."""
        entries = self.messages(field)
        return {entry.text(1): entry.message(2) for entry in entries}

    def integers(self, field: int) -> list[int]:
        """Signed integers of a repeated field, packed or one by one."""
        found: list[int] = []
        for value in self._fields.get(field, []):
            if isinstance(value, int):
                found.append(value)
                continue
            at = 0
            self._budget.left -= len(value)
            if self._budget.left < 0:
                raise self._budget.error("too many numbers outside weight.bin")
            while at < len(value):
                number, at = _varint(value, at, self._budget)
                found.append(number)
        return [number - (number >> 63 << 64) for number in found]

    def floats(self, field: int) -> list[float]:
        """float32 numbers of a repeated field, packed or one by one."""
        data = b"".join(self._all(field))
        if len(data) % 4:
            raise self._budget.error(f"field {field} holds no float32 numbers")
        return list(struct.unpack(f"<{len(data) // 4}f", data))

    def _all(self, field: int) -> list[memoryview]:
        values = self._fields.get(field, [])
        found = [value for value in values if not isinstance(value, int)]
        if len(found) != len(values):
            raise self._budget.error(f"field {field} is a number")
        return found

    def _decoded(self, value: memoryview) -> str:
        try:
            return bytes(value).decode()
        except UnicodeDecodeError as error:
            raise self._budget.error("a name is not UTF-8") from error


def _varint(data: memoryview, at: int, budget: Budget) -> tuple[int, int]:
    """The 64-bit integer at an offset, and the offset after it."""
    value = 0
    for i, byte in enumerate(data[at : at + MAX_VARINT_BYTES]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            if value >> 64:
                raise budget.error("a number beyond 64 bits")
            return value, at + i + 1
    raise budget.error("a number without end")
