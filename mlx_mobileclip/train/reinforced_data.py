"""Read reinforced data: stored augmentations, synthetic captions and teachers' embeddings.

A shard is a tar file, read as hostile input: nothing is unpacked to disk or unpickled, and every
size is checked before memory is allocated. Source of the format: apple/ml-mobileclip e15d36e,
`training/open_clip_v2.patch` and `training/dr/transforms.py`.
"""

import gzip
import io
import json
import re
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..checkpoints.torch_pickle import read_torch_stream
from ..errors import CheckpointError, DataError

MAX_SAMPLE_BYTES = {
    "image": 64 << 20,
    "text": 1 << 20,
    "json": 4 << 20,
    "npz": 16 << 20,
    "torch": 16 << 20,
}
MAX_HEADER_BYTES = 16 << 10  # header of a member, including extended headers
MAX_AUGMENTATIONS = 1024
MAX_CAPTIONS = 1024
MAX_WIDTH = 65536
MAX_SIDE = 1 << 20
MEMBERS = {  # suffix to kind
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"),
    **dict.fromkeys(("txt", "url.txt"), "text"),
    **dict.fromkeys(("json", "syn.json", "paug.json"), "json"),
    "npz": "npz",
    "pth.gz": "torch",
}
MAX_MAGNITUDE = 1e6
# Raised by zipfile and numpy for damaged files: RuntimeError for encrypted ones, the last four for
# headers that Python's parser rejects.
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    TypeError,
    SyntaxError,
    MemoryError,
    tokenize.TokenError,
)
OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Augmentation of an image before it was shown to the teachers: a crop, then operations.

    Attributes:
        crop: (top, left, height, width) in pixels of the original, which is then resized to the
            input size of the model; None for no crop.
        operations: Names from `OPERATIONS` with their magnitudes, in order.
    """

    crop: tuple[int, int, int, int] | None
    operations: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Reinforced:
    """One sample of a reinforced data set.

    Attributes:
        key: Name of the sample in the shard.
        image: Encoded image; None in the published shards, which contain only its URL.
        url: URL of the image; None if the shard has none.
        caption: Ground-truth caption.
        synthetic: Synthetic captions by the name of their set.
        augmentations: A augmentations of the image.
        image_embeddings: Teacher embeddings of the augmented images, float32 (A, D).
        caption_embeddings: Teacher embedding of the ground-truth caption, float32 (D,).
        synthetic_embeddings: Teacher embeddings of the n captions of each set, float32 (n, D).
    """

    key: str
    image: bytes | None
    url: str | None
    caption: str
    synthetic: dict[str, tuple[str, ...]]
    augmentations: tuple[Augmentation, ...]
    image_embeddings: NDArray[np.float32]
    caption_embeddings: NDArray[np.float32]
    synthetic_embeddings: dict[str, NDArray[np.float32]]


def read_shard(path: Path) -> Iterator[Reinforced]:
    """Read the samples of one shard in order; nothing is unpacked to disk or unpickled.

    Args:
        path: Uncompressed tar file with members `<key>.<kind>`, those of a sample consecutive:
            .txt, .url.txt, .syn.json, .paug.json, .npz or .pth.gz (.npz is preferred), and .jpg,
            .png or .webp.

    Yields:
        One sample at a time.

    Raises:
        DataError: the file or a named member is damaged, too large or in another format.
    """
    if path.exists() and not path.is_file():  # a pipe would block
        raise DataError(f"{path}: is not a file; give the path of a shard")
    try:
        with path.open("rb") as opened, _open_tar(reader := _LimitedReader(opened, path)) as tar:
            key, last, members = "", 0, dict[str, bytes]()
            while (member := _next_member(tar, reader)) is not None:
                name, _, suffix = Path(member.name).name.partition(".")
                kind = MEMBERS.get(suffix.lower())
                if member.size < 0 or member.offset < last:
                    raise DataError(f"{path}: members overlap; download it again")
                last = member.offset_data
                if kind is None or not member.isreg():
                    continue
                name = str(Path(member.name).parent / name)
                if name != key and members:
                    yield _sample(f"{path}: {key[:200]}", key, members)
                    members = {}
                key = name
                limit = MAX_SAMPLE_BYTES[kind]
                if member.size > limit:
                    raise DataError(
                        f"{path}: {member.name[:200]} has {member.size} bytes; "
                        f"the limit is {limit >> 20} MB"
                    )
                reader.remaining = limit + tarfile.RECORDSIZE
                file = tar.extractfile(member)
                members[suffix.lower()] = file.read() if file else b""
            if members:
                yield _sample(f"{path}: {key[:200]}", key, members)
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: cannot be read as an uncompressed tar file ({str(error)[:200]}); "
            "download it again"
        ) from error


class _LimitedReader(io.BufferedIOBase):
    """A file that limits how much tarfile may read, because tarfile itself does not."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path, self.remaining = file, path, 0

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= self.remaining:
            raise DataError(f"{self._path}: a header is too large; download it again")
        self.remaining -= size
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _open_tar(reader: _LimitedReader) -> tarfile.TarFile:
    reader.remaining = MAX_HEADER_BYTES  # `open` reads the first header
    return tarfile.open(fileobj=reader, mode="r:")


def _next_member(tar: tarfile.TarFile, reader: _LimitedReader) -> tarfile.TarInfo | None:
    """Next member; drops earlier ones from memory, because a shard may have millions."""
    reader.remaining = MAX_HEADER_BYTES
    tar.members = []  # type: ignore[attr-defined]
    return tar.next()


def _sample(where: str, key: str, members: Mapping[str, bytes]) -> Reinforced:
    embeddings = "pth.gz" if "pth.gz" in members and "npz" not in members else "npz"
    for needed in ("txt", "syn.json", "paug.json", embeddings):
        if needed not in members:
            raise DataError(f"{where}: has no .{needed}; this is not a shard of reinforced data")
    read = _read_npz if embeddings == "npz" else _read_torch_gz
    arrays = read(members[embeddings], where)
    synthetic = _synthetic(_json(members["syn.json"], where), where)
    augmentations = _augmentations(_json(members["paug.json"], where), where)
    images, texts = (_embeddings(arrays, name, where) for name in ("image_emb", "text_emb"))
    if len(images) != len(augmentations):
        raise DataError(f"{where}: {len(augmentations)} augmentations, {len(images)} embeddings")
    synthetic_embeddings = {}
    for name, captions in synthetic.items():
        # Older shards store the rows of the synthetic captions after the ground-truth one.
        rows = texts[1:] if len(texts) > 1 else _embeddings(arrays, f"{name}_emb", where)
        if len(rows) != len(captions) or rows.shape[1] != images.shape[1]:
            raise DataError(
                f"{where}: {name}: {len(captions)} captions, embeddings of shape {rows.shape}"
            )
        synthetic_embeddings[name] = rows
    if texts.shape[1] != images.shape[1]:
        raise DataError(f"{where}: widths {images.shape[1]} and {texts.shape[1]} differ")
    image = next((members[s] for s in ("jpg", "jpeg", "png", "webp") if s in members), None)
    url = members.get("url.txt")
    return Reinforced(
        key=key,
        image=image,
        url=None if url is None else _text(url, where).strip(),
        caption=_text(members["txt"], where),
        synthetic=synthetic,
        augmentations=augmentations,
        image_embeddings=images,
        caption_embeddings=texts[0],
        synthetic_embeddings=synthetic_embeddings,
    )


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: a text is not UTF-8; download the shard again") from error


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({str(error)[:100]})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: is not a JSON object")
    return value


def _synthetic(values: dict[str, Any], where: str) -> dict[str, tuple[str, ...]]:
    sets = {name: texts for name, texts in values.items() if re.match(r"syn_text", name)}
    if not sets or len(sets) > MAX_CAPTIONS:
        raise DataError(f"{where}: .syn.json has {len(sets)} sets named syn_text*")
    for name, texts in sets.items():
        if (
            not isinstance(texts, list)
            or not 1 <= len(texts) <= MAX_CAPTIONS
            or not all(isinstance(text, str) for text in texts)
        ):
            raise DataError(f"{where}: {name[:80]} is not a list of 1 to {MAX_CAPTIONS} texts")
    return {name: tuple(texts) for name, texts in sets.items()}


def _augmentations(values: dict[str, Any], where: str) -> tuple[Augmentation, ...]:
    entries = values.get("param_aug")
    if isinstance(entries, str):  # the published shards nest JSON in JSON
        entries = _json(b'{"param_aug":' + entries.encode("utf-8", "replace") + b"}", where)[
            "param_aug"
        ]
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_AUGMENTATIONS:
        raise DataError(f"{where}: param_aug is not a list of 1 to {MAX_AUGMENTATIONS} entries")
    return tuple(_augmentation(entry, where) for entry in entries)


def _augmentation(entry: Any, where: str) -> Augmentation:
    if not isinstance(entry, list) or len(entry) != 2:
        raise DataError(f"{where}: an augmentation is not a crop and its operations")
    crop, operations = entry
    if crop is not None and not (
        isinstance(crop, list)
        and len(crop) == 4
        and all(type(n) is int and 0 <= n <= MAX_SIDE for n in crop)
        and crop[2] > 0
        and crop[3] > 0
    ):
        raise DataError(f"{where}: {str(crop)[:80]} is not a crop (top, left, height, width)")
    if operations is None:
        operations = []
    if not isinstance(operations, list) or len(operations) > len(OPERATIONS):
        raise DataError(f"{where}: {str(operations)[:80]} is not a list of operations")
    return Augmentation(
        None if crop is None else (crop[0], crop[1], crop[2], crop[3]),
        tuple(_operation(operation, where) for operation in operations),
    )


def _operation(entry: Any, where: str) -> tuple[str, float]:
    if (
        not isinstance(entry, list)
        or len(entry) != 2
        or type(entry[0]) is not int
        or not 0 <= entry[0] < len(OPERATIONS)
        or type(entry[1]) not in (int, float)
        or not abs(entry[1]) <= MAX_MAGNITUDE  # refuses NaN too
    ):
        raise DataError(
            f"{where}: {str(entry)[:80]} is not an operation (0 to {len(OPERATIONS) - 1}, "
            "magnitude)"
        )
    return OPERATIONS[entry[0]], float(entry[1])


def _embeddings(
    arrays: Mapping[str, NDArray[np.float32]], name: str, where: str
) -> NDArray[np.float32]:
    if name not in arrays:
        raise DataError(f"{where}: its embeddings have no {name[:80]}")
    return arrays[name]


def _read_npz(data: bytes, where: str) -> dict[str, NDArray[np.float32]]:
    """Read arrays of embeddings by name; each must be 2-D, finite floats of the declared size."""
    arrays: dict[str, NDArray[np.float32]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist()[:MAX_CAPTIONS]:
                name = entry.filename.removesuffix(".npy")
                if not re.fullmatch(r"image_emb|text_emb|syn_text\w*_emb", name):
                    continue
                if entry.file_size > MAX_SAMPLE_BYTES["npz"]:
                    raise DataError(f"{where}: {name} unpacks to {entry.file_size} bytes")
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise DataError(f"{where}: {name} uses an unsupported compression")
                with archive.open(entry) as file:
                    # One byte more than declared, to detect a wrong size.
                    arrays[name] = _read_npy(file.read(entry.file_size + 1), f"{where}: {name}")
    except UNREADABLE as error:
        raise DataError(
            f"{where}: damaged .npz ({str(error)[:100]}); download the shard again"
        ) from error
    return arrays


def _read_torch_gz(data: bytes, where: str) -> dict[str, NDArray[np.float32]]:
    """Read the same arrays from a gzipped PyTorch file, as in the bfloat16 data sets."""
    limit = MAX_SAMPLE_BYTES["torch"]
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(limit + 1)
        if len(unpacked) > limit:
            raise DataError(f"{where}: .pth.gz unpacks to more than {limit >> 20} MB")
        tensors = read_torch_stream(io.BytesIO(unpacked), f"{where}: .pth.gz")
    except (*UNREADABLE, CheckpointError) as error:
        raise DataError(
            f"{where}: damaged .pth.gz ({str(error)[:200]}); download the shard again"
        ) from error
    arrays = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or max(tensor.shape) > MAX_WIDTH:
            raise DataError(f"{where}: {name[:80]} has shape {str(tensor.shape)[:80]}")
        arrays[name] = np.array(tensor.astype(mx.float32))
        if not np.isfinite(arrays[name]).all():
            raise DataError(f"{where}: {name[:80]} contains values that are not finite")
    return arrays


def _read_npy(data: bytes, where: str) -> NDArray[np.float32]:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"{where}: .npy version {version} is not supported")
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read_header(file)
    if dtype not in (np.float16, np.float32, np.float64) or fortran:
        raise DataError(f"{where}: contains {dtype}; expected floats in C order")
    if len(shape) != 2 or not all(0 < n <= MAX_WIDTH for n in shape):
        raise DataError(f"{where}: has shape {str(shape)[:80]}; expected (rows, width)")
    body = data[file.tell() :]
    if len(body) != shape[0] * shape[1] * dtype.itemsize:
        raise DataError(f"{where}: shape {shape} does not match its {len(body)} bytes")
    values = np.frombuffer(body, dtype).reshape(shape).astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{where}: contains values that are not finite")
    return values
