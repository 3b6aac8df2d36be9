"""One worker process of a gateway: ``python -m real.gateway.worker INDEX PARENT_PID``, its config on stdin."""

import asyncio
import gc
import logging
import signal
import sys

import uvloop

from real.gateway.api_keys import keys_from_environment
from real.gateway.app import GatewayApp, refuse
from real.gateway.classification import Classification
from real.gateway.client_server import ClientServer
from real.gateway.config import GatewayConfig
from real.gateway.forwarding import Forwarding
from real.gateway.health_checks import HealthChecks
from real.gateway.listener import Listener
from real.gateway.metrics import GatewayMetrics
from real.gateway.replicas import Replica, Routing
from real.gateway.upstream import Upstream
from real.processes.parent_death import die_with_parent
from sim.streams import stream

READY_LINE = "ready"
_POLL_S = 0.02
_FLUSH_S = 0.5
_GC_THRESHOLDS = (50_000, 20, 100)
"""Rarer than Python's: with a thousand streams open, each full collection would hold them all up."""


async def serve(config: GatewayConfig, worker: int) -> None:
    """Serve until told to stop, then drain."""
    loop = asyncio.get_running_loop()
    stop, stop_now = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: stop_now.set() if stop.is_set() else stop.set())
    keys = keys_from_environment(config.serve.api_key_env)
    decides = config.routes_by_class and len(config.classes) > 1
    classification = None
    if decides:
        classification = Classification(
            config.serve.classifier,
            config.classes,
            most_waiting=max(1, config.serve.limits.max_queued_per_expert // config.router.workers),
            longest_s=config.serve.timeouts.queue_s,
        )
    metrics = GatewayMetrics()
    routing = Routing(config, worker, stream(config.seed, "policy", worker).random)
    async with Upstream(config.serve.timeouts) as upstream:
        forwarding = Forwarding(config, worker, routing, classification, upstream, metrics)
        told = dict.fromkeys(routing.replicas, 0)

        def tell(replica: Replica) -> None:
            name, ejections = config.experts[replica.expert].name, replica.health.ejections
            metrics.replica(name, replica.index, up=replica.health.usable, ejections=ejections - told[replica])
            told[replica] = ejections
            forwarding.admission.hand_out()

        checks = HealthChecks(routing.replicas, upstream, config.serve.health, tell)
        await checks.first()
        app = GatewayApp(config, keys, forwarding)
        server = ClientServer(app.handle, refuse, config.serve.timeouts, config.serve.limits.max_body_bytes)
        listener = Listener(config.serve.host, config.serve.port, server)
        checking = asyncio.create_task(checks.run())
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        print(READY_LINE, flush=True)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((stopping, checking), return_when=asyncio.FIRST_COMPLETED)
        if checking.done():
            checking.result()  # a defect, for checks go on for ever: better a new worker than one without them
        app.draining = True
        await _drained(forwarding, config.serve.drain_s, stop_now)
        checking.cancel()
        forwarding.stop()
        await _drained(forwarding, _FLUSH_S, asyncio.Event())
        listener.close()
        await server.close(_FLUSH_S)
    if classification is not None:
        classification.close()


async def _drained(forwarding: Forwarding, longest_s: float, stop_now: asyncio.Event) -> None:
    """Wait until nothing is under way, or for so long, or until told to stop now."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + longest_s
    while forwarding.ledger.open and loop.time() < end_s and not stop_now.is_set():
        await asyncio.sleep(_POLL_S)


def main() -> None:
    """Run one worker; exits with 2 when it cannot begin."""
    worker, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent_pid)
    logging.basicConfig(level=logging.WARNING, format=f"gateway worker {worker}: %(message)s")
    config = GatewayConfig.model_validate_json(sys.stdin.buffer.read())
    try:
        uvloop.run(serve(config, worker))
    except (ValueError, OSError) as error:
        print(f"gateway: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
