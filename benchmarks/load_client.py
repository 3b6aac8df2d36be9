"""CPU time that a streamed chunk costs the load client, beside aiohttp's client, from a server that only writes.

python -m benchmarks.load_client [STREAMS [TOKENS]]
"""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from time import monotonic, process_time

import aiohttp
import uvloop

from real.users.exchange import Exchange
from real.users.load_client import LoadClient, Patience

GAP_S = 0.05
SLOTS = 10  # streams are spread over this many moments of each gap
EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1,"model":"one","choices":'
    b'[{"index":0,"text":" token","logprobs":null,"finish_reason":null}]}\n\n'
)
BODY = b'{"prompt":"a","stream":true}'
PATIENCE = Patience(connect_s=30, first_token_s=60, idle_s=60, total_s=600)


def chunk(data: bytes) -> bytes:
    """Return one chunk of a chunked HTTP body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Stream(asyncio.Protocol):
    """Answers each request with a stream; the ticker writes its tokens."""

    active: dict["Stream", int] = {}  # noqa: RUF012  # one server a process

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        """Begin an answer when the request is complete."""
        self.received += data
        if self.received.endswith(BODY):
            self.received = b""
            self.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            Stream.active[self] = 0

    def connection_lost(self, error: Exception | None) -> None:
        """Forget it."""
        Stream.active.pop(self, None)

    def write(self, data: bytes) -> None:
        """Send bytes."""
        self.transport.write(data)  # type: ignore[attr-defined]


async def serve(port: int, tokens: int) -> None:
    """Write a token to each stream every ``GAP_S``."""
    loop = asyncio.get_running_loop()
    await loop.create_server(Stream, "127.0.0.1", port, backlog=4096)
    print("ready", flush=True)
    event, end = chunk(EVENT), chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    due_s, slot = loop.time(), 0
    while True:
        due_s += GAP_S / SLOTS
        slot = (slot + 1) % SLOTS
        await asyncio.sleep(max(0.0, due_s - loop.time()))
        for stream in [each for each in Stream.active if id(each) // 16 % SLOTS == slot]:
            Stream.active[stream] += 1
            stream.write(event)
            if Stream.active[stream] == tokens:
                del Stream.active[stream]
                stream.write(end)


async def with_ours(url: str, streams: int) -> int:
    """Return the chunks received with the load client."""
    client = LoadClient(url, PATIENCE)
    futures: list[asyncio.Future[Exchange]] = []
    for number in range(streams):
        futures.append(asyncio.get_running_loop().create_future())
        client.send(BODY, str(number), futures[-1].set_result)
    exchanges = await asyncio.gather(*futures)
    client.close()
    assert not any(exchange.failure for exchange in exchanges)
    return sum(len(exchange.chunk_s) for exchange in exchanges)


async def with_aiohttp(url: str, streams: int) -> int:
    """Return the chunks received with aiohttp's client, each with its time as in vLLM's load generator."""

    async def one(session: aiohttp.ClientSession) -> int:
        times = []
        async with session.post(f"{url}/v1/completions", data=BODY) as answer:
            async for data, _ in answer.content.iter_chunks():
                if b'"choices":[{' in data:
                    times.append(monotonic())
        return len(times)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        return sum(await asyncio.gather(*(one(session) for _ in range(streams))))


def measure(name: str, client: Callable[[str, int], Awaitable[int]], streams: int, tokens: int, port: int) -> None:
    """Run one client against a server of its own and print what it took."""
    command = [sys.executable, "-m", "benchmarks.load_client", "serve", str(port), str(tokens)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        began_s, cpu_began_s = monotonic(), process_time()

        async def run() -> int:
            return await client(f"http://127.0.0.1:{port}", streams)

        chunks = uvloop.run(run())
        cpu_s, wall_s = process_time() - cpu_began_s, monotonic() - began_s
        server.kill()
    print(f"{name:>8}: {cpu_s / chunks * 1e6:5.1f} us CPU a chunk, {chunks / wall_s:,.0f} chunks/s, {chunks:,} chunks")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        uvloop.run(serve(int(sys.argv[2]), int(sys.argv[3])))
    else:
        count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
        length = int(sys.argv[2]) if len(sys.argv) > 2 else 200
        print(f"{count:,} streams, a token every {GAP_S * 1e3:.0f} ms, {length} tokens each")
        measure("ours", with_ours, count, length, 18_977)
        measure("aiohttp", with_aiohttp, count, length, 18_978)
