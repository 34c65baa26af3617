"""What a server allows; imports nothing heavy."""

from dataclasses import dataclass

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8080
KEY_VARIABLE = "MLX_FASTVLM_API_KEY"


@dataclass(frozen=True)
class Settings:
    """Limits and access.

    Attributes:
        api_key: Key that requests must have; None for none.
        hosts: Names that a Host header may have besides localhost and addresses, in lower case.
        max_batch: Answers computed together.
        max_queue: Requests that wait while `max_batch` are answered; more get 429.
        max_tokens: Most tokens of an answer.
        max_images: Most images of a request.
        max_body_bytes: Size of a request; all requests being read may take four times as much.
        drain_s: Seconds in which running answers may end after SIGTERM or SIGINT.
        page: Whether to serve the page.
        header_s: Seconds in which the head of a request must arrive.
        body_s: Seconds in which its body must arrive.
        write_s: Seconds in which a client must take what was sent to it.
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
