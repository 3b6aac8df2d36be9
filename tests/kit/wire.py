"""Bytes on a raw connection: malformed requests, and clients that hardly send."""

import asyncio
from dataclasses import dataclass

_HOST = b"Host: test\r\n"
_BODY = b'{"prompt":"code","max_tokens":2}'
_LENGTH = b"Content-Length: %d\r\n" % len(_BODY)
_POST = b"POST /v1/completions HTTP/1.1\r\n"
_SMUGGLED = b"POST /v1/completions HTTP/1.1\r\nHost: smuggled\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True)
class Case:
    """One malformed request.

    Attributes:
        statuses: of the answer, if there is one; the connection may also just be closed.
    """

    name: str
    wire: bytes
    statuses: tuple[int, ...] = (400,)


MALFORMED = (
    Case(
        "content-length and transfer-encoding",
        _POST + _HOST + _LENGTH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + _SMUGGLED,
    ),
    Case(
        "transfer-encoding and content-length",
        _POST + _HOST + b"Transfer-Encoding: chunked\r\n" + _LENGTH + b"\r\n0\r\n\r\n" + _SMUGGLED,
    ),
    Case("two content-lengths", _POST + _HOST + b"Content-Length: 5\r\nContent-Length: 32\r\n\r\n" + _BODY),
    Case("two equal content-lengths", _POST + _HOST + _LENGTH + _LENGTH + b"\r\n" + _BODY),
    Case("content-length list", _POST + _HOST + b"Content-Length: 32, 32\r\n\r\n" + _BODY),
    Case("negative content-length", _POST + _HOST + b"Content-Length: -1\r\n\r\n" + _BODY),
    Case("signed content-length", _POST + _HOST + b"Content-Length: +32\r\n\r\n" + _BODY),
    Case("space before colon", _POST + _HOST + b"Content-Length : 32\r\n\r\n" + _BODY),
    Case("chunked twice", _POST + _HOST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    Case("unknown transfer-encoding", _POST + _HOST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    Case("bad chunk size", _POST + _HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
    Case("signed chunk size", _POST + _HOST + b"Transfer-Encoding: chunked\r\n\r\n+2\r\n{}\r\n0\r\n\r\n"),
    Case("huge chunk size", _POST + _HOST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 20 + b"\r\n{}"),
    Case("chunk longer than said", _POST + _HOST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n"),
    Case("bare line feeds", b"POST /v1/completions HTTP/1.1\nHost: test\nContent-Length: 2\n\n{}"),
    Case("folded header", _POST + _HOST + b"X-A: b\r\n c\r\n" + _LENGTH + b"\r\n" + _BODY),
    Case("NUL in a header", _POST + _HOST + b"X-A: b\0c\r\n" + _LENGTH + b"\r\n" + _BODY),
    Case("carriage return in a header", _POST + _HOST + b"X-A: b\rc\r\n" + _LENGTH + b"\r\n" + _BODY),
    Case("control character in the path", b"GET /v1/\x01models HTTP/1.1\r\nHost: test\r\n\r\n"),
    Case("100 kB header", _POST + _HOST + b"X-A: " + b"a" * 100_000 + b"\r\n\r\n", (400, 431)),
    Case("100 kB path", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: test\r\n\r\n", (400, 414)),
    Case("1,000 headers", _POST + _HOST + b"".join(b"X-%d: a\r\n" % i for i in range(1000)) + b"\r\n", (400, 431)),
    Case("no such version", b"GET /health HTTP/3.7\r\nHost: test\r\n\r\n", (400, 505)),
    Case("not HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)),
    Case("body too large", _POST + _HOST + b"Content-Length: 99999999\r\n\r\n{", (413,)),
    Case("absolute-form path elsewhere", b"POST http://127.0.0.1:1/x HTTP/1.1\r\nHost: a\r\n\r\n", (400, 404, 405)),
    Case("two slashes", b"POST //v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", (404, 405)),
    Case("dots", b"POST /x/../../v1/../mock/state HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", (404,)),
    Case("CONNECT", b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: a\r\n\r\n", (400, 404, 405)),
    Case("compressed body", _POST + _HOST + b"Content-Encoding: gzip\r\n" + _LENGTH + b"\r\n" + _BODY, (415,)),
)


async def exchange(port: int, wire: bytes, *, wait_s: float = 5.0) -> bytes:
    """Send bytes and return what comes back until the connection closes or is silent for a while."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    try:
        writer.write(wire)
        async with asyncio.timeout(wait_s):
            while data := await reader.read(65536):
                got += data
    except (TimeoutError, OSError):
        pass
    finally:
        writer.transport.abort()
    return got


def statuses(answer: bytes) -> list[int]:
    """Of the answers in these bytes."""
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] + [
        int(part[:3]) for part in answer.split(b"HTTP/1.0 ")[1:]
    ]
