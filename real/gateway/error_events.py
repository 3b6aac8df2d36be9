"""Errors as vLLM and OpenAI word them: a JSON body with a status, or an event in a stream that has begun.

A gateway's own error and an expert's look alike to a client: ``data: {"error": ...}`` and then ``data: [DONE]``.
"""

import json
import math
from http import HTTPStatus

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    408: "RequestTimeoutError",
    429: "RateLimitError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


class Refusal(Exception):  # noqa: N818 - an answer to a client, not a defect
    """A request that gets an error of the gateway's own instead of an expert's answer.

    Attributes:
        outcome: what the ledger and the metrics call it.
        status: of the HTTP answer.
        message: one sentence for the client.
        param: the field of the request at fault, if any.
        retry_after_s: when to try again, if that may help.
    """

    def __init__(
        self, outcome: str, status: int, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.status = status
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        """Return the headers this error brings."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """Return the JSON body of an error."""
    kind = _TYPES.get(status, HTTPStatus(status).phrase.replace(" ", "") + "Error")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}}).encode()


def error_event(status: int, message: str) -> bytes:
    """Return the bytes that end a stream which cannot go on."""
    return b"data: " + error_body(status, message) + b"\n\ndata: [DONE]\n\n"
