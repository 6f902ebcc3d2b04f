"""Errors of the HTTP interface, in OpenAI's form."""

from typing import Any


class ApiError(Exception):
    """An answer other than success. `param` names the field of the request that is wrong."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON document that OpenAI's clients read."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down; repeat the request later", code="shutting_down")
