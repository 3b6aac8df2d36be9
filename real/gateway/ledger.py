"""What became of each completion request: counted in and out, in the metrics and in the request log."""

import json
import os
import re
import secrets
import time
from dataclasses import asdict
from typing import Final

from real.gateway.metrics import GatewayMetrics, Outcome

_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")


def request_id_of(given: str | None) -> str:
    """Return the client's request id if it can be passed on, else a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


class Ledger:
    """The account of one worker.

    Attributes:
        open: requests that have begun and not ended.
    """

    def __init__(self, metrics: GatewayMetrics, request_log: str | None) -> None:
        """Begin with nothing open; ``request_log`` is the file that gets a line a request, if any."""
        self._metrics = metrics
        self._log = None if request_log is None else os.open(request_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.open = 0

    def begin(self) -> None:
        """Count a request in."""
        self.open += 1
        self._metrics.begin()

    def end(self, outcome: Outcome) -> None:
        """Count a request out; the one place where its outcome is written down."""
        self.open -= 1
        ended_s = time.monotonic()
        self._metrics.end(outcome, ended_s)
        if self._log is not None:
            os.write(self._log, json.dumps({**asdict(outcome), "ended_s": ended_s}).encode() + b"\n")
