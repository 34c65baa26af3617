"""Errors reported to clients, in OpenAI's format."""

from typing import Any

from starlette.responses import JSONResponse

from mlx_mobileclip.errors import DataError, ImageError, ModelError, PromptError

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response.

    Attributes:
        status: HTTP status.
        message: What is wrong, and what to do.
        param: Name of the invalid field.
        code: OpenAI's error code.
        headers: Additional HTTP headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = KINDS.get(self.status, kind)
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers)


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for an invalid request."""
    return ApiError(400, message, param=param, code=code)


def to_api_error(error: Exception) -> ApiError:
    """Convert any exception to the error that the client gets."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (PromptError, ImageError, DataError)):
        return bad(str(error))
    if isinstance(error, ModelError):  # caused by the checkpoint
        return ApiError(500, str(error))
    return ApiError(500, "internal server error; its operator can find the cause on stderr")
