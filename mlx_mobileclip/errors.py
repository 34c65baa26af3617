"""Errors that are shown to the user as one line: what failed, what was expected, what to do."""


class ModelError(Exception):
    """Base of every error whose text is meant for the user; the command line exits 1 on it."""


class CheckpointError(ModelError):
    """A checkpoint's files are missing, damaged, or do not hold the model they claim to."""


class ConfigError(ModelError):
    """A value in a JSON file of the checkpoint is missing, of the wrong type or out of range."""


class ImageError(ModelError):
    """An image cannot be read, or exceeds the limits on format, side or pixel count."""


class PromptError(ModelError):
    """A prompt is malformed, too long, or disagrees with the images given."""


class DataError(ModelError):
    """A file of the user's data (labels, lists, texts, training shards, output) cannot be used."""


def name_some(names: list[str], limit: int = 8) -> str:
    """List at most `limit` names and say how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
