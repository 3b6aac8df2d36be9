"""One request of a real user and what came back, with its times."""

from array import array
from collections.abc import Callable
from math import nan
from typing import Any


class Exchange:
    """One request and what came back; times are ``time.monotonic()``, NaN where not reached.

    Attributes:
        sent_s: when its first byte was due to leave, before a connection was looked for.
        chunk_s: when each chunk with a token arrived.
        ended_s: when the answer was complete or had failed.
        status: of HTTP; 0 before an answer.
        failure: what went wrong, a few words that group alike failures; empty for a good answer.
        detail: the message with it.
        headers: of the answer, lower case: the gateway's own, ``retry-after`` and ``x-request-id``.
        usage: of the answer, as the engine sent it; None without.
        context: the sender's own; the client does not look at it.
    """

    __slots__ = ("chunk_s", "context", "detail", "ended_s", "failure", "headers", "on_end", "sent_s", "status", "usage")

    def __init__(self, on_end: "Callable[[Exchange], None]", context: Any = None):
        self.on_end = on_end
        self.context = context
        self.sent_s = nan
        self.chunk_s = array("d")
        self.ended_s = nan
        self.status = 0
        self.failure = ""
        self.detail = ""
        self.headers: dict[str, str] = {}
        self.usage: dict[str, Any] | None = None

    @property
    def first_token_s(self) -> float:
        """When the first chunk arrived."""
        return self.chunk_s[0] if self.chunk_s else nan

    @property
    def last_token_s(self) -> float:
        """When the last chunk with a token arrived."""
        return self.chunk_s[-1] if self.chunk_s else nan
