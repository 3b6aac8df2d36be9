"""vLLM's log of its iterations: one line each, with ``--enable-logging-iteration-details``, read while it grows.

The engine's front end writes a line when an iteration's outputs reach it, before it streams them to users. vLLM's own
timestamps count whole seconds, so the server is given a logging configuration with microseconds
(``write_logging_config`` and VLLM_LOGGING_CONFIG_PATH). ``elapsed_s`` is what the engine waited for the model; from
line to line there is scheduling and output handling as well.
"""

import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

LOGGING_CONFIG_VARIABLE = "VLLM_LOGGING_CONFIG_PATH"

_LINE = re.compile(
    rb" (?P<created>\d{9,}\.\d{6}) \[[^\]]*\] (?:Engine (?P<engine>\d+): )?Iteration\((?P<iteration>\d+)\): "
    rb"(?P<context_requests>\d+) context requests, (?P<context_tokens>\d+) context tokens, "
    rb"(?P<generation_requests>\d+) generation requests, (?P<generation_tokens>\d+) generation tokens, "
    rb"iteration elapsed time: (?P<elapsed_ms>[\d.]+) ms(?:, \w* ?KV cache usage: (?P<kv_percent>[\d.]+)%)?"
)


class IterationLine(NamedTuple):
    """One iteration as logged.

    Attributes:
        engine: its number within the server.
        iteration: its number, from 0 at the server's start.
        ended_s: when its outputs reached the front end, on ``time.monotonic()``'s clock.
        context_requests, context_tokens: prompts, or chunks of them, without any output yet.
        generation_requests, generation_tokens: requests with output; one token each unless one is recomputed.
        elapsed_s: how long the engine waited for the model.
        kv_usage: share of KV blocks in use afterwards; None where the version does not log it.
    """

    engine: int
    iteration: int
    ended_s: float
    context_requests: int
    context_tokens: int
    generation_requests: int
    generation_tokens: int
    elapsed_s: float
    kv_usage: float | None


def logging_config(level: str = "INFO") -> dict[str, Any]:
    """Return vLLM's own logging configuration with the time in microseconds after the one in seconds.

    As ``vllm/logger.py`` (0.32.0) sets it up by itself without a terminal: same prefix, levels and stream. The
    formatter is named as a class, since 0.26 makes it of the format alone and later versions of a level as well.
    """
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "vllm": {
                "class": "vllm.logging_utils.NewLineFormatter",
                "datefmt": "%m-%d %H:%M:%S",
                "format": (
                    "(%(processName)s pid=%(process)d) %(levelname)s %(asctime)s %(created).6f "
                    "[%(fileinfo)s:%(lineno)d] %(message)s"
                ),
            }
        },
        "handlers": {
            "vllm": {
                "class": "logging.StreamHandler",
                "formatter": "vllm",
                "level": level,
                "stream": "ext://sys.stdout",
            }
        },
        "loggers": {"vllm": {"handlers": ["vllm"], "level": level, "propagate": False}},
    }


def write_logging_config(path: Path) -> Path:
    """Write ``logging_config`` as the JSON file that VLLM_LOGGING_CONFIG_PATH must name; return its path."""
    path.write_text(json.dumps(logging_config(), indent=1) + "\n", encoding="utf-8")
    return path


class IterationLog:
    """The iteration lines of one server's log, each returned once."""

    def __init__(self, path: Path, *, start_bytes: int = 0):
        """Read from a place in the file on; it need not exist yet."""
        self._path = path
        self._read_bytes = start_bytes

    def new_lines(self) -> list[IterationLine]:
        """Return the iterations logged since the last call; a line half written waits for the next one."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read_bytes)
                new = file.read()
        except FileNotFoundError:
            return []
        whole = new.rfind(b"\n") + 1
        self._read_bytes += whole
        # A wall clock may be set; the monotonic one is what clients use.
        to_monotonic_s = time.monotonic() - time.time()
        return [_line(found, to_monotonic_s) for found in _LINE.finditer(new[:whole])]


def _line(found: re.Match[bytes], to_monotonic_s: float) -> IterationLine:
    percent = found["kv_percent"]
    return IterationLine(
        engine=int(found["engine"] or 0),
        iteration=int(found["iteration"]),
        ended_s=float(found["created"]) + to_monotonic_s,
        context_requests=int(found["context_requests"]),
        context_tokens=int(found["context_tokens"]),
        generation_requests=int(found["generation_requests"]),
        generation_tokens=int(found["generation_tokens"]),
        elapsed_s=float(found["elapsed_ms"]) / 1e3,
        kv_usage=None if percent is None else float(percent) / 100,
    )
