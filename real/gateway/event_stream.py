"""Server-sent events on their way through: bytes in, the same bytes out, cut only where an event ends.

No chunk is parsed as JSON. Because a client only ever holds whole events, an error event can follow at any time, and
because the last events are kept, a stream that ends without ``[DONE]`` or with an error is known as such.
"""

_DONE = (b"data: [DONE]", b"data:[DONE]")
_ERROR = (b'data: {"error"', b'data:{"error"')
_LONGEST_EVENT_BYTES = 2**18
_TOKEN = b'data: {"'
_ANY_TOKEN = b'data: {"":0}\n\n'
_MOST_BEGINNINGS = 4096
_beginnings: dict[int, bytes] = {}


def _beginning(length: int) -> bytes:
    """What a token's chunk of so many bytes, all in all, begins with; remembered: most are of a few lengths."""
    beginning = b"-"  # as none does
    for digits in range(1, 8):
        size = length - digits - 4
        if size >= len(_ANY_TOKEN) and len(b"%x" % size) == digits:
            beginning = b"%x\r\n%b" % (size, _TOKEN)
    if len(_beginnings) < _MOST_BEGINNINGS:
        _beginnings[length] = beginning
    return beginning


class EventStream:
    """Follows one stream of events."""

    __slots__ = ("_before", "_data_lines", "_found", "_last", "_rest")

    def __init__(self) -> None:
        self._rest = b""  # of an event whose end has not come yet
        self._last = b""
        self._before = b""
        self._data_lines = 0
        self._found: list[bytes] | None = None

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

    def is_token(self, data: bytes) -> bool:
        """Whether these bytes are just one chunk with one event of JSON, framed as we would; if so, it is noted.

        Most come like this, and go on as they are. Nothing of them is kept: a thousand streams that each hold on to
        what came last would make the processor fetch cold memory for every token. To be asked between two chunks and
        two events only.
        """
        size = len(data)
        beginning = _beginnings.get(size) or _beginning(size)
        if (
            data.startswith(beginning)
            and data.endswith(b"\n\n\r\n")
            and not data.startswith(b'error"', len(beginning))
            and data.count(b"\ndata:") == 1
        ):
            self._data_lines += 1
            self._before, self._last, self._found = self._last, _ANY_TOKEN, None
            return True
        return False

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
        self._before, self._last, self._found = self._last, data, None
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
        if self._found is None:
            self._found = []
            text = b"\n" + self._before + self._last
            for _ in range(2):
                start = max(text.rfind(b"\ndata:"), 0)
                self._found.append(text[start:].lstrip(b"\n").partition(b"\n")[0].rstrip(b"\r"))
                text = text[:start]
        return self._found
