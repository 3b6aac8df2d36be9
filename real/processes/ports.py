"""TCP ports of this machine: whether one is free, whose it is going to be, and who listens on it."""

import socket
from contextlib import suppress
from pathlib import Path

from real.loopback import LOOPBACK

_LISTENS = "0A"  # a socket's state in /proc/net/tcp


def port_is_free(port: int) -> bool:
    """Whether this loopback port can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


class PortClaims:
    """The ports that one fleet has or is going to have; no other fleet on this machine gets them meanwhile.

    An engine loads for a minute before it listens, and until then its port looks free to everybody else. So each claim
    is a name in Linux's abstract namespace of sockets, which one process has at a time and loses however it ends.
    """

    def __init__(self) -> None:
        self._held: dict[int, socket.socket] = {}

    def claim(self, port: int) -> bool:
        """Whether the port is now this fleet's; elsewhere than on Linux, always."""
        if port in self._held or not hasattr(socket, "AF_UNIX") or not Path("/proc/net/unix").exists():
            return True
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0expert-router-port-{port}")
        except OSError:
            claim.close()
            return False
        self._held[port] = claim
        return True

    def release(self) -> None:
        """Give all of them up; may be called again."""
        for claim in self._held.values():
            claim.close()
        self._held.clear()


def group_listens(group: int | None, port: int) -> bool:
    """Whether a process of this group listens on the port; also where the system does not tell whose port it is."""
    try:
        listeners = _listeners(port)
    except OSError:
        return True
    groups = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile, or somebody else's
            its_group = int((process / "stat").read_text().rpartition(")")[2].split()[2])
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    if str(descriptor.readlink()) in listeners:
                        groups.add(its_group)
    return group in groups or not groups


def _listeners(port: int) -> set[str]:
    """The sockets that listen on a port, as /proc names a process's descriptors."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    return {f"socket:[{row[9]}]" for row in rows if row[3] == _LISTENS and int(row[1].rpartition(":")[2], 16) == port}
