"""Access checks: the Host, Origin and API key of a request."""

import hmac
import ipaddress
import re

from starlette.datastructures import Headers

from .errors import ApiError
from .settings import Settings

HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::\d{1,5})?", re.ASCII)
OPEN_PATHS = ("/", "/page.js", "/page.css", "/health")  # need no key


def check_access(headers: Headers, path: str, settings: Settings) -> None:
    """Refuse requests that another web site may have caused, and those without the key.

    A site can let its name resolve to this machine (DNS rebinding), so that the browser treats
    this server as the same origin. The Host header still has that name. Addresses cannot be
    rebound.

    Raises:
        ApiError: the Host is not allowed, the Origin is another site, or the key is wrong.
    """
    host = headers.get("host", "").lower()
    match = HOST.fullmatch(host)
    if match is None or len(headers.getlist("host")) != 1:
        raise ApiError(400, "the Host header is missing or malformed")
    name = match[1].rstrip(".")
    if name != "localhost" and name not in settings.hosts and not _is_address(name):
        raise ApiError(
            403, f"the host {name[:60]!r} is not allowed; the operator can add it with --allow-host"
        )
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
        raise ApiError(403, "requests from other web sites are refused")
    if settings.api_key is not None and path not in OPEN_PATHS:
        _check_key(headers.get("authorization", ""), settings.api_key)


def _check_key(given: str, key: str) -> None:
    scheme, _, token = given.partition(" ")
    # In constant time, so that the response time does not reveal the key.
    is_equal = hmac.compare_digest(token.strip().encode("utf-8", "replace"), key.encode())
    if scheme.lower() != "bearer" or not is_equal:
        raise ApiError(
            401,
            "the API key is missing or wrong; send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address `host`."""
    if host == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback
