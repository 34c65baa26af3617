"""The web page of `--ui`: three files, which may not load any others."""

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src blob: data:; media-src blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """Return the routes of the page's files."""
    return [_route("/", "index.html"), _route("/page.js"), _route("/page.css")]


def _route(path: str, name: str | None = None) -> Route:
    name = name or path[1:]
    data = resources.files(__package__ or "").joinpath("static", name).read_bytes()
    headers = HEADERS | {"Content-Type": TYPES[name]}

    async def show(request: Request) -> Response:
        return Response(data, headers=headers)

    return Route(path, show)
