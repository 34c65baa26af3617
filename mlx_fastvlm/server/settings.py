"""Settings of a server; imports nothing heavy."""

from dataclasses import dataclass

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8080
KEY_VARIABLE = "MLX_FASTVLM_API_KEY"


@dataclass(frozen=True)
class Settings:
    """Limits and access control.

    Attributes:
        api_key: Key that requests must have; None if no key is required.
        hosts: Lower-case names allowed in the Host header besides localhost and addresses.
        max_batch: Maximum number of answers generated in one batch.
        max_queue: Maximum number of waiting requests; further ones get 429.
        max_tokens: Maximum number of tokens of an answer.
        max_images: Maximum number of images in a request.
        max_body_bytes: Maximum size of a body; all bodies being read may take 4 times as much.
        drain_s: Seconds that running answers get to finish after SIGTERM or SIGINT.
        page: Whether to serve the web page.
        header_s: Timeout for receiving the head of a request, in seconds.
        body_s: Timeout for receiving its body, in seconds.
        write_s: Timeout for a client to read what was sent to it, in seconds.
        max_connections: Open connections; more are closed at once.
    """

    api_key: str | None = None
    hosts: frozenset[str] = frozenset()
    max_batch: int = 8
    max_queue: int = 32
    max_tokens: int = 2048
    max_images: int = 16
    max_body_bytes: int = 32 << 20
    drain_s: float = 30.0
    page: bool = False
    header_s: float = 10.0
    body_s: float = 60.0
    write_s: float = 30.0
    max_connections: int = 256
