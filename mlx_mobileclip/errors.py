"""Errors that are shown to the user as one line: what failed, what was expected, what to do."""

MAX_MESSAGE = 4096
MAX_NAME = 120
LFS_POINTER = b"version https://git-lfs."


class ModelError(Exception):
    """Base of every error whose text is meant for the user; the command line exits 1 on it.

    The text is one line without control characters, even if it quotes names from a checkpoint.
    """

    def __init__(self, message: str):
        """Keep the message, made safe to print."""
        shown = message[:MAX_MESSAGE]
        super().__init__("".join(c if c.isprintable() else "\ufffd" for c in shown))


class CheckpointError(ModelError):
    """The files of a checkpoint are missing, damaged or inconsistent."""


class ConfigError(ModelError):
    """A value in a JSON file of the checkpoint is missing, of the wrong type or out of range."""


class ImageError(ModelError):
    """An image cannot be read, or exceeds the limits on format, side or pixel count."""


class PromptError(ModelError):
    """A prompt is malformed, too long, or does not match the images."""


class DataError(ModelError):
    """A file of the user's data (labels, lists, texts, training shards, output) cannot be used."""


def refuse_lfs_pointer(start: bytes, where: object) -> None:
    """Raise CheckpointError if a file is a Git LFS pointer, as in a clone without LFS."""
    if start.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{where}: is a Git LFS pointer, not the file itself; run git lfs pull in its "
            "directory, or download the file"
        )


def name_some(names: list[str], limit: int = 8) -> str:
    """List at most `limit` names and say how many more there are."""
    shown = ", ".join(name[:MAX_NAME] for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
