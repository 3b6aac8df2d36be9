"""A timer to the microsecond for an event loop whose own count whole milliseconds. Linux."""

import asyncio
import ctypes
import os
from collections.abc import Callable
from math import floor

_CLOCK_MONOTONIC = 1
_ABSOLUTE = 1


class _Time(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


class _Setting(ctypes.Structure):
    _fields_ = (("interval", _Time), ("value", _Time))


class PreciseTimer:
    """Calls back once for each time it is set to."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._callback = callback
        asyncio.get_running_loop().add_reader(self._file, self._fire)

    def set(self, at_s: float) -> None:
        """Call back at this ``time.monotonic()``, or at once where it has passed."""
        seconds = floor(at_s)
        value = _Time(seconds, max(1, int((at_s - seconds) * 1e9)))
        setting = _Setting(_Time(0, 0), value)
        if self._libc.timerfd_settime(self._file, _ABSOLUTE, ctypes.byref(setting), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def _fire(self) -> None:
        os.read(self._file, 8)
        self._callback()
