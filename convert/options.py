"""The options of a conversion, and which of them can be combined."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mlx_mobileclip.device import parse_dtype
from mlx_mobileclip.errors import ConfigError
from mlx_mobileclip.models.clip import PreprocessConfig

from .export.runtimes import TARGETS

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class ConvertOptions:
    """The arguments of `convert`, which describes them; checked on construction.

    Raises:
        ConfigError: an option has no such value, or two options exclude each other.
    """

    model: str | os.PathLike[str]
    mlx_path: Path
    revision: str | None = None
    dtype: str = "float16"
    variant: str | None = None
    config: str | os.PathLike[str] | None = None
    preprocess: PreprocessConfig | None = None
    vision_from: str | os.PathLike[str] | None = None
    layout: str | None = None
    quantize: bool = False
    q_bits: int | None = None
    q_group_size: int | None = None
    q_mode: str | None = None
    q_parts: Sequence[str] | None = None
    q_mixed: bool = False
    max_size: str | None = None
    calibration: Path | None = None
    dequantize: bool = False
    verify: bool = False
    upload_repo: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        values = (self.q_bits, self.q_group_size, self.q_mode, self.q_parts, self.calibration)
        if not self.quantize and (self.mixed or any(value is not None for value in values)):
            raise ConfigError("--calibration, --max-size and every --q-... option need -q; add it")
        if self.mixed and self.q_mode not in (None, "affine"):
            raise ConfigError(
                f"{self.q_mode} has a fixed number of bits; leave out --q-mode, or mixed bits"
            )
        if self.max_size is not None:
            parse_size(self.max_size)
        if self.quantize and self.dequantize:
            raise ConfigError("-q and --dequantize are opposites; to requantise, convert twice")
        parse_dtype(self.dtype)
        if self.layout is not None and self.layout not in TARGETS:
            raise ConfigError(f"layout {self.layout!r} is not one of {', '.join(TARGETS)}")

    @property
    def mixed(self) -> bool:
        """Whether layers may be quantised to different numbers of bits."""
        return self.q_mixed or self.max_size is not None

    def command_line(self) -> list[str]:
        """The arguments of `python -m convert` that set these options."""
        arguments: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            arguments.append(f"--{field.name.replace('_', '-')}")
            if isinstance(value, list | tuple):
                arguments += value
            elif isinstance(value, PreprocessConfig):
                arguments.append(json.dumps(asdict(value)))
            elif value is not True:
                arguments.append(str(value))
        return arguments


def parse_size(text: str) -> int:
    """Convert a size such as 400MB or 1.5G to bytes.

    Raises:
        ConfigError: it is not a number with an optional unit.
    """
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--max-size {text[:40]}: is not a size; write it like 400MB or 1.5GB")
    return int(float(match[1]) * 1000 ** " KMG".index(match[2].upper() or " "))
