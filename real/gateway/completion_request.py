"""What the gateway reads of a completion request: its text, its model. The rest is the expert's to judge."""

import json
from dataclasses import dataclass
from typing import Any

from real.gateway.error_events import Refusal

_MOST_VALUES = 500_000
"""Longest list of values in a body: a few megabytes of empty lists would hold the event loop up for half a second."""


def _no_such_number(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


# Built once: json.loads and json.dumps would build them anew for each request.
_decode = json.JSONDecoder(parse_constant=_no_such_number).decode
_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


@dataclass(slots=True)
class CompletionRequest:
    """A parsed body.

    Attributes:
        fields: all of it.
        model: as the client named it; None when it did not.
        text: what a classifier reads; None for a prompt given as token ids.
    """

    fields: dict[str, Any]
    model: str | None
    text: str | None

    def for_model(self, model: str) -> bytes:
        """Return the body as an expert gets it.

        Raises:
            Refusal: it holds a number that JSON cannot.
        """
        self.fields["model"] = model
        try:
            return _encode(self.fields).encode()
        except (ValueError, RecursionError):
            raise _bad("a number in it is too large") from None


def parse_completion(body: bytes | bytearray, *, chat: bool) -> CompletionRequest:
    """Read the body of a request to ``/v1/chat/completions`` (``chat``) or ``/v1/completions``.

    Raises:
        Refusal: it is no JSON object, or its model or prompt cannot be read.
    """
    if len(body) > _MOST_VALUES and sum(body.count(mark) for mark in (b",", b"[", b"{")) > _MOST_VALUES:
        raise _bad(f"it holds more than {_MOST_VALUES:,} values")
    try:
        fields = _decode(body.decode())
    except RecursionError:
        raise _bad("it is nested too deeply") from None
    except ValueError:  # of json, of UTF-8, and of integers with thousands of digits
        raise _bad("it is not valid JSON in UTF-8") from None
    if not isinstance(fields, dict):
        raise _bad("it must be a JSON object")
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise _bad("model must be a string", "model")
    text = _chat_text(fields.get("messages")) if chat else _prompt_text(fields.get("prompt"))
    return CompletionRequest(fields, model, text)


def _prompt_text(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        kinds = set(map(type, prompt))  # of half a million token ids in some milliseconds
        if kinds == {str}:
            return "\n".join(prompt)
        if kinds == {int}:
            return None
        if kinds == {list} and all(part and isinstance(part[0], int) for part in prompt):
            return None
    raise _bad("prompt must be a string, a list of strings, or token ids", "prompt")


def _chat_text(messages: Any) -> str:
    """The users' words, joined; without any, everybody's."""
    if not isinstance(messages, list) or not messages:
        raise _bad("messages must be a list with at least one message", "messages")
    said: list[tuple[Any, str]] = []
    for message in messages:
        if not isinstance(message, dict):
            raise _bad("each message must be an object", "messages")
        said.append((message.get("role"), _content_text(message.get("content"))))
    of_users = [text for role, text in said if role == "user"]
    return "\n".join(of_users or [text for _, text in said])


def _content_text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(text for text in texts if isinstance(text, str))
    raise _bad("the content of a message must be a string or a list of parts", "messages")


def _bad(problem: str, param: str | None = None) -> Refusal:
    return Refusal("client_error", 400, f"the request's body cannot be used: {problem}", param=param)
