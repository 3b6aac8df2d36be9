"""Where the body of a replica's answer ends: after its last chunk, after so many bytes, or with the connection."""

import re
from typing import Final, Protocol

_CHUNK_SIZE: Final = re.compile(rb"([0-9a-fA-F]{1,12})[ \t]*(?:;[^\r\n]*)?")
_LONGEST_LINE_BYTES: Final = 2**14
_NO_BODY: Final = frozenset((204, 304))


class MalformedBodyError(Exception):
    """Bytes that are no body of its kind."""


class ResponseBody(Protocol):
    """A body as it comes.

    Attributes:
        done: whether it has ended.
        rest: what came after its end; a replica that waits for its next request sends nothing.
    """

    done: bool
    rest: bytes

    def feed(self, data: bytes) -> bytes:
        """Take what has come and return what of it is content.

        Raises:
            MalformedBodyError: it is no such body.
        """


def body_of(status: int, headers: list[tuple[bytes, bytes]]) -> ResponseBody:
    """Return the body that follows a head.

    Raises:
        MalformedBodyError: there is no telling where it would end.
    """
    length = None
    for name, value in headers:
        if name == b"transfer-encoding":
            if value.lower() != b"chunked":
                raise MalformedBodyError
            return ChunkedBody()
        if name == b"content-length":
            length = int(value)
    return SizedBody(0 if status in _NO_BODY else length)


class SizedBody:
    """A body of so many bytes; with None, it ends with the connection, which looks the same as a break."""

    __slots__ = ("_left", "done", "rest")

    def __init__(self, length: int | None) -> None:
        self._left = length
        self.done = length == 0
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """Count the bytes down."""
        left = self._left
        if left is None:
            return data
        if len(data) > left:
            data, self.rest = data[:left], data[left:]
        self._left = left - len(data)
        self.done = self._left == 0
        return data


class ChunkedBody:
    """A body in chunks. What follows the last one (trailers) is dropped.

    Attributes:
        between: whether the next byte begins a chunk.
    """

    __slots__ = ("_held", "_left", "_step", "between", "done", "rest")

    def __init__(self) -> None:
        self._held = b""  # a line that has not ended yet
        self._left = 0  # bytes of the chunk
        self._step = "size"
        self.between = True
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """Take the chunks apart."""
        if self._held:
            data, self._held = self._held + data, b""
        pieces: list[bytes] = []
        at = 0
        while not self.done:
            if self._step == "data":
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left:
                    break
                self._step = "end"
            end = data.find(b"\r\n", at)
            if end < 0:
                self._held = data[at:]
                if len(self._held) > _LONGEST_LINE_BYTES or (self._step == "end" and self._held not in (b"", b"\r")):
                    raise MalformedBodyError
                break
            self._line(data[at:end])
            at = end + 2
            stop = at + self._left
            if self._step == "data" and data.startswith(b"\r\n", stop):  # all of it is here
                pieces.append(data[at:stop])
                at, self._left, self._step = stop + 2, 0, "size"
        if self.done:
            self.rest = data[at:]
        self.between = self._step == "size" and not self._held
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _line(self, line: bytes) -> None:
        if self._step == "size":
            size = _CHUNK_SIZE.fullmatch(line)
            if size is None:
                raise MalformedBodyError
            self._left = int(size[1], 16)
            self._step = "data" if self._left else "trailers"
        elif self._step == "end":
            if line:
                raise MalformedBodyError
            self._step = "size"
        elif not line:
            self.done = True
