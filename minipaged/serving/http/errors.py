"""What a client is told when something is wrong: OpenAI's body, and the status that its SDKs act on (they retry 429 and 5xx)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_AFTER = "1"  # seconds, with 429 and 503


class ApiError(Exception):
    """A refusal. status: HTTP's; param: the field that was wrong; code: a word for programs; headers: further ones."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("retry-after", RETRY_AFTER)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that says it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code or self.status}}

    def to_json(self) -> bytes:
        """The body as it is sent."""
        return msgspec.json.encode(self.body)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400: the request can never be served as it is."""
    return ApiError(400, message, param=param, code=code)
