"""Errors that a client sees, in OpenAI's shape."""

from typing import Any

from starlette.responses import JSONResponse

from mlx_mobileclip.errors import DataError, ImageError, ModelError, PromptError

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer with an error status.

    Attributes:
        status: HTTP status.
        message: What is wrong, and what to do.
        param: Name of the field that is wrong.
        code: OpenAI's name of the problem.
        headers: Further headers.
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
        """The JSON object."""
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
        """The same as a response."""
        return JSONResponse(self.body(), self.status, self.headers)


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error for a request that cannot be used."""
    return ApiError(400, message, param=param, code=code)


def of_model(error: Exception) -> ApiError:
    """What a client sees of an error that a model has raised."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (PromptError, ImageError, DataError)):
        return bad(str(error))
    if isinstance(error, ModelError):  # the checkpoint's fault
        return ApiError(500, str(error))
    return ApiError(500, "the server failed; its operator can see why on stderr")
