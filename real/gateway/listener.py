"""A listening socket whose waiting connections are all accepted at a time.

uvloop's own server accepts one connection in each turn of its loop. While a thousand streams keep a turn at some
milliseconds, a thousand new clients would wait for seconds. When no file descriptor is left, those who wait go on
waiting: the socket is looked at twice a second, and what is open goes on.
"""

import asyncio
import logging
import socket
from collections.abc import Callable

_log = logging.getLogger(__name__)

BACKLOG = 4096
_AT_A_TIME = 256
_PAUSE_S = 0.5


class Listener:
    """Accepts connections and gives each a protocol."""

    def __init__(self, host: str, port: int, factory: Callable[[], asyncio.Protocol]) -> None:
        """Bind and listen; other processes may do so on the same port.

        Raises:
            OSError: the address cannot be used.
        """
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self._socket = socket.socket(family, kind, protocol)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.setblocking(False)
        self._socket.bind(address)
        self._socket.listen(BACKLOG)
        self._factory = factory
        self._loop = asyncio.get_running_loop()
        self._beginning: set[asyncio.Task[None]] = set()
        self._held_up = False
        self._start()

    def _start(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_A_TIME):
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                if self._held_up:  # and now nobody waits any more
                    self._held_up = False
                    _log.warning("accepts connections again")
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:  # the socket stays readable, so looking at it at once would never end
                if not self._held_up:
                    self._held_up = True
                    _log.warning("cannot accept connections for now: %s", error.strerror)
                self._loop.remove_reader(self._socket)
                self._loop.call_later(_PAUSE_S, self._start)
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._begin(connection))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    async def _begin(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._factory, connection)
        except OSError:  # it has gone already
            connection.close()

    def close(self) -> None:
        """Stop listening; connections stay."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()
