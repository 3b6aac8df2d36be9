"""Server-sent events on their way through: bytes in, the same bytes out, cut only where an event ends.

No chunk is parsed as JSON. Because a client only ever holds whole events, an error event can follow at any time, and
because the last events are kept, a stream that ends without ``[DONE]`` or with an error is known as such.
"""

_DONE = (b"data: [DONE]", b"data:[DONE]")
_ERROR = (b'data: {"error"', b'data:{"error"')
_LONGEST_EVENT_BYTES = 2**18
_MOST_PREFIXES = 4096
_chunk_prefixes: dict[int, bytes] = {}


def _chunk_prefix(length: int) -> bytes:
    """What a chunk of so many bytes, all in all, begins with; remembered, because most are of a few lengths."""
    prefix = b""
    for digits in range(1, 8):
        if length - 4 - digits >= 16 ** (digits - 1) and len(prefix := b"%x\r\n" % (length - 4 - digits)) == digits + 2:
            break
    if len(_chunk_prefixes) < _MOST_PREFIXES:
        _chunk_prefixes[length] = prefix
    return prefix


class EventStream:
    """Follows one stream of events."""

    __slots__ = ("_before", "_data_lines", "_ends_of", "_found", "_last", "_rest")

    def __init__(self) -> None:
        self._rest = b""  # of an event whose end has not come yet
        self._last = b""
        self._before = b""
        self._data_lines = 0
        self._ends_of: bytes | None = None
        self._found: list[bytes] = []

    def whole(self, data: bytes) -> bytes:
        """Take bytes of the stream and return those that are now whole events, perhaps none."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not data.endswith((b"\n\n", b"\r\n\r\n")):
            line_feeds, both = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
            end = max(line_feeds + 2 if line_feeds >= 0 else 0, both + 4 if both >= 0 else 0)
            if end == 0:
                self._rest = data
                if len(data) < _LONGEST_EVENT_BYTES:
                    return b""
                end = len(data)  # no event is this long: pass it on rather than hold ever more
            data, self._rest = data[:end], data[end:]
        self._note(data)
        return data

    def is_chunk(self, data: bytes) -> bool:
        """Whether these bytes are just one chunk of whole events, framed as we would; if so, they are noted.

        Most tokens come like this, and go on as they are. To be asked between two chunks and two events only.
        """
        size = len(data)
        if not (
            data.endswith(b"\n\n\r\n") and data.startswith(_chunk_prefixes.get(size) or _chunk_prefix(size) or b"-")
        ):
            return False
        self._before, self._last = self._last, data
        self._data_lines += data.count(b"\ndata:")
        return True

    @property
    def is_between(self) -> bool:
        """Whether the next byte begins an event."""
        return not self._rest

    def remainder(self) -> bytes:
        """Return what came after the last whole event; to be passed on when the stream has ended well."""
        rest, self._rest = self._rest, b""
        if rest:
            self._note(rest)
        return rest

    def _note(self, data: bytes) -> None:
        self._before, self._last = self._last, data
        self._data_lines += data.count(b"\ndata:") + data.startswith(b"data:")

    @property
    def chunks(self) -> int:
        """Events with data so far, ``[DONE]`` not counted."""
        return self._data_lines - self.is_done

    @property
    def is_done(self) -> bool:
        """Whether the last event was ``[DONE]``."""
        return self._ends()[0] in _DONE

    @property
    def is_error(self) -> bool:
        """Whether one of the last two events is an error."""
        return any(event.startswith(_ERROR) for event in self._ends())

    def _ends(self) -> list[bytes]:
        """The last two lines of data, the very last one first; looked for once."""
        if self._ends_of is not self._last:
            text = b"\n" + self._before + self._last
            self._ends_of, self._found = self._last, []
            for _ in range(2):
                start = max(text.rfind(b"\ndata:"), 0)
                self._found.append(text[start:].lstrip(b"\n").partition(b"\n")[0].rstrip(b"\r"))
                text = text[:start]
        return self._found
