"""The least that a proxy can do: bytes of one connection onto another, ``python -m tests.kit.splice --port P --to P``.

No backpressure, no errors, no routing: a floor to hold the gateway's cost against, on whatever machine it runs.
"""

import argparse
import asyncio
from typing import cast

import uvloop


class Side(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, other: "Side | None" = None) -> None:
        self.other = other

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        assert self.other is not None
        self.other.transport.write(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.other is not None:
            self.other.transport.close()


class Front(Side):
    def __init__(self, to_port: int) -> None:
        super().__init__()
        self.to_port = to_port
        self.early = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.task = asyncio.create_task(self.connect())

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        _, self.other = await loop.create_connection(lambda: Side(self), "127.0.0.1", self.to_port)
        self.other.transport.write(self.early)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.early += data
        else:
            self.other.transport.write(data)


async def serve(port: int, to_port: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Front(to_port), "127.0.0.1", port, backlog=4096)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--to", type=int, required=True)
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.port, arguments.to))
