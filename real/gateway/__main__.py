"""The gateway: ``python -m real.gateway CONFIG.json`` starts its workers on one port and looks after them.

It says ``ready`` on stderr once all of them listen. SIGTERM drains them, a second one stops them at once. A worker
that dies is started again, after a pause that grows while it keeps dying. The parent serves their metrics.
"""

import asyncio
import os
import resource
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from pydantic import ValidationError

from real.gateway.bind import check_bind
from real.gateway.config import GatewayConfig
from real.gateway.metrics_page import MetricsPage
from real.loopback import LOOPBACK

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_STEADY_S = 10.0
"""A worker that lived this long starts again after the first pause."""
_CANNOT_BEGIN = 2
_KILL_AFTER_S = 5.0


class Gateway:
    """The parent of the workers."""

    def __init__(self, config: GatewayConfig, metrics: MetricsPage) -> None:
        self._config = config
        self._metrics = metrics
        self._text = config.model_dump_json().encode()
        self._workers: dict[int, Process] = {}
        self._ready: set[int] = set()
        self._stopping = asyncio.Event()
        self._signals = 0
        self._failed = False

    async def run(self) -> int:
        """Serve until told to stop; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        await asyncio.gather(*(self._look_after(index) for index in range(self._config.router.workers)))
        return _CANNOT_BEGIN if self._failed else 0

    def _stop(self) -> None:
        self._stopping.set()
        self._signals += 1
        for worker in self._workers.values():
            if worker.returncode is None:
                worker.send_signal(signal.SIGTERM)
        if self._signals == 1:
            asyncio.get_running_loop().call_later(self._config.serve.drain_s + _KILL_AFTER_S, self._kill)

    def _kill(self) -> None:
        for worker in self._workers.values():
            if worker.returncode is None:
                worker.kill()

    async def _look_after(self, index: int) -> None:
        pause_s = _FIRST_PAUSE_S
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            began_s = loop.time()
            worker = await self._start(index)
            status = await worker.wait()
            self._metrics.forget(worker.pid)
            if self._stopping.is_set():
                return
            if status == _CANNOT_BEGIN:
                self._failed = True
                self._stop()
                return
            pause_s = _FIRST_PAUSE_S if loop.time() - began_s > _STEADY_S else min(2 * pause_s, _LONGEST_PAUSE_S)
            _say(f"worker {index} ended with status {status}; starting it again in {pause_s:g} s")
            try:
                await asyncio.wait_for(self._stopping.wait(), pause_s)
            except TimeoutError:
                continue

    async def _start(self, index: int) -> Process:
        """Start a worker; whoever it was, all are told once they listen for the first time."""
        worker = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "real.gateway.worker", str(index), str(os.getpid())),
            env={**os.environ, **self._metrics.environment(), "OMP_NUM_THREADS": "1"},
            stdin=PIPE,
            stdout=PIPE,
            start_new_session=True,  # a terminal's Ctrl-C reaches the parent, and from it the workers, once
        )
        self._workers[index] = worker
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(self._text)
        worker.stdin.close()
        if await worker.stdout.readline() and len(self._ready) < self._config.router.workers:
            self._ready.add(index)
            if len(self._ready) == self._config.router.workers:
                _say(f"ready at http://{self._config.serve.host}:{self._config.serve.port}")
        if self._stopping.is_set() and worker.returncode is None:
            worker.send_signal(signal.SIGTERM)
        return worker


def _say(line: str) -> None:
    print(f"gateway: {line}", file=sys.stderr, flush=True)


def main() -> None:
    """Run the gateway of a config file; exits with 2 when it cannot begin."""
    if len(sys.argv) != 2:
        _say("usage: python -m real.gateway CONFIG.json")
        sys.exit(_CANNOT_BEGIN)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:  # two descriptors a request; workers inherit it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    metrics = MetricsPage()
    try:
        config = GatewayConfig.model_validate_json(Path(sys.argv[1]).read_bytes())
        check_bind(config)
        metrics.serve(LOOPBACK, config.serve.metrics_port)  # whatever the gateway's own host: they ask for no key
        sys.exit(asyncio.run(Gateway(config, metrics).run()))
    except ValidationError as error:
        for found in error.errors(include_url=False):
            _say(f"{'.'.join(str(part) for part in found['loc'])}: {found['msg']}")
        sys.exit(_CANNOT_BEGIN)
    except (ValueError, OSError) as error:
        _say(str(error))
        sys.exit(_CANNOT_BEGIN)
    finally:
        metrics.remove()


if __name__ == "__main__":
    main()
