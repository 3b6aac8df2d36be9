"""A stand-in for the gateway in tests of what starts and watches it: says ready, and drains for a moment."""

import signal
import sys
import time
from types import FrameType


def drain(number: int, frame: FrameType | None) -> None:
    print("draining", flush=True)
    time.sleep(0.3)
    print("drained", flush=True)
    sys.exit(0)


signal.signal(signal.SIGTERM, drain)
print("gateway: ready at http://127.0.0.1", file=sys.stderr, flush=True)
while True:
    time.sleep(1)
