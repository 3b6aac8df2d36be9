"""No orphans: a child process that the kernel ends when its parent ends, however that happens."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process as soon as its parent is gone, even by ``kill -9``. Linux only.

    Args:
        parent_pid: of the parent that started this process, in case it is gone already.
    """
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process. Linux only; elsewhere the supervisor's clean-up has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
