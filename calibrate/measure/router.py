"""What the router takes: CPU seconds of the real gateway, classification over prompt length, and delay.

The gateway runs in front of one real engine under its own configuration, and users send it real text of two output
lengths; the difference is what a token costs. It costs more when few come together, for then the gateway is woken for
each few of them: a lone user's tokens against those of many tell the cost of a wake-up from that of a token.
Classification is timed by itself, over prompt lengths. What an idle request waits more through the gateway than without
it, beyond that work, is delay on the way to the expert and back.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from calibrate.measure.client import PATIENCE
from calibrate.measure.engine_under_test import EngineGoneError
from calibrate.measure.machine import command_line, cpu_seconds, processes_under
from sim.fleet_file import LoadedFleetFile
from sim.spec import ExpertSpec
from sim.spec_base import Seconds, Spec

if TYPE_CHECKING:
    from real.users.load_client import LoadClient

USERS = 32
RUN_S = 6.0
SHORT_OUTPUT, LONG_OUTPUT = 4, 64
PROMPT_TOKENS = 48
CLASSIFIED_TOKENS = (16, 64, 256, 1024)
CLASSIFY_S = 0.3
"""How long each prompt length is classified again and again."""
IDLE_REQUESTS = 15
IDLE_S = 1.5
_ROUTED = "expert-router"
_START_LIMIT_S = 60.0
_DRAIN_S = 5.0


class Server(Protocol):
    """What a gateway can stand before: an ``EngineUnderTest``, for one."""

    @property
    def url(self) -> str:
        """Where it listens."""
        ...

    @property
    def served_model(self) -> str:
        """The name it answers to."""
        ...


class RouterCosts(Spec):
    """Figures of ``sim.spec.RouterSpec``, measured."""

    per_request_s: Seconds
    per_prompt_token_s: Seconds
    per_output_token_s: Seconds
    per_wake_up_s: Seconds
    expert_network_s: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One stretch of traffic.

    Attributes:
        users: who sent it, each one request after the other.
        output_tokens: of each request.
        cpu_s: of what is measured, over ``took_s``.
    """

    users: int
    requests: int
    output_tokens: int
    cpu_s: float
    took_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuCosts:
    """CPU seconds of a server."""

    per_request_s: float
    per_output_token_s: float
    per_wake_up_s: float


class Prompts:
    """Real text in an exact number of tokens, each unlike the others."""

    def __init__(self, expert: ExpertSpec):
        from real.users.prompts import PromptWriter, load_tokenizer, read_corpus

        texts = [text for texts in read_corpus().values() for text in texts]
        self._writer = PromptWriter(texts, load_tokenizer(expert), nonce=time.time_ns() % 10**9)
        self._number = 0

    def write(self, tokens: int) -> str:
        """Return a prompt of this many tokens."""
        from real.users.prompts import PromptRequest

        self._number += 1
        return self._writer.write([PromptRequest(tokens, self._number, self._number)])[0].text


def measure_router(
    file: LoadedFleetFile,
    fleet: str,
    expert: ExpertSpec,
    engine: Server,
    folder: Path,
    *,
    cores: Sequence[int] = (),
) -> RouterCosts:
    """Measure the router of a fleet in front of a running engine, in less than a minute.

    Args:
        file: as loaded.
        fleet: with a router.
        expert: what the engine runs, for its tokenizer.
        engine: stands for every expert of the fleet.
        folder: for the gateway's configuration and log.
        cores: the gateway is confined to; empty: to none.

    Raises:
        EngineGoneError: the gateway did not come up, or a request through it failed.
        ValueError: the classifier or the tokenizer cannot be loaded.
    """
    from real.experts.expert_server import EngineFailedError
    from real.processes.guarded_process import LifeLine
    from real.serving.gateway_process import GatewayProcess

    prompts = Prompts(expert)
    fixed_s, per_token_s = classification_s(file, prompts)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "gateway.json"
    config.write_text(_gateway_config(file, fleet, engine), encoding="utf-8")
    life = LifeLine()
    url = f"http://127.0.0.1:{file.serve.port}"
    command = [sys.executable, "-m", "real.gateway", str(config)]
    gateway = GatewayProcess(command, url=url, logs=folder, life=life, cores=cores)
    try:
        gateway.start()
        deadline_s = time.monotonic() + _START_LIMIT_S
        while not gateway.is_ready():
            if time.monotonic() > deadline_s:
                raise EngineGoneError(f"the gateway did not come up in {_START_LIMIT_S:g} s; log: {gateway.log}")
            time.sleep(0.1)
        assert gateway.pid is not None
        return asyncio.run(_measure(url, engine, gateway.pid, prompts, fixed_s, per_token_s))
    except EngineFailedError as error:
        raise EngineGoneError(str(error)) from error
    finally:
        gateway.stop(_DRAIN_S)
        life.close()


def classification_s(file: LoadedFleetFile, prompts: Prompts) -> tuple[float, float]:
    """Return seconds to classify a prompt, and each of its tokens, with the file's classifier."""
    from real.router.classifier import load_classifier

    classifier = load_classifier(file.serve.classifier, list(file.workload.classes))
    tokens, took_s = [], []
    for count in CLASSIFIED_TOKENS:
        texts = [prompts.write(count) for _ in range(8)]
        classifier.classify(texts[0])
        begin_s, rounds = time.process_time(), 0
        while time.process_time() - begin_s < CLASSIFY_S:
            for text in texts:
                classifier.classify(text)
            rounds += len(texts)
        tokens.append(float(count))
        took_s.append((time.process_time() - begin_s) / rounds)
    per_token_s, fixed_s = np.polyfit(tokens, took_s, 1, w=1 / np.array(took_s))
    return max(0.0, float(fixed_s)), max(0.0, float(per_token_s))


def costs_of(loads: Sequence[Traffic], idle_share: float, per_prompt_token_s: float) -> CpuCosts:
    """Return what a server spends, from a short and a long output of one user, and the same two of many users.

    Of ``n`` tokens that come together each costs ``b + w / n``: ``w`` to wake the server, ``b`` for the token. All
    users of a load are taken to decode together.

    Args:
        loads: in that order.
        idle_share: CPU seconds per second without requests.
        per_prompt_token_s: known otherwise.
    """

    def each_s(load: Traffic) -> float:
        return (load.cpu_s - idle_share * load.took_s) / load.requests

    def token_s(short: Traffic, long: Traffic) -> float:
        return (each_s(long) - each_s(short)) / (long.output_tokens - short.output_tokens)

    alone_s, together_s = token_s(*loads[:2]), max(0.0, token_s(*loads[2:]))
    users = loads[2].users
    per_wake_up_s = min(max(0.0, (alone_s - together_s) / (1 - 1 / users)), users * together_s)
    work_s = together_s * loads[2].output_tokens + per_prompt_token_s * PROMPT_TOKENS
    return CpuCosts(
        per_request_s=max(0.0, each_s(loads[2]) - work_s),
        per_output_token_s=together_s - per_wake_up_s / users,
        per_wake_up_s=per_wake_up_s,
    )


async def _measure(
    url: str, engine: Server, pid: int, prompts: Prompts, fixed_s: float, per_prompt_token_s: float
) -> RouterCosts:
    from real.users.load_client import LoadClient

    through, direct = LoadClient(url, PATIENCE), LoadClient(engine.url, PATIENCE)
    try:
        waits_s: dict[Any, list[float]] = {through: [], direct: []}
        for _ in range(IDLE_REQUESTS):
            for client, model in ((through, _ROUTED), (direct, engine.served_model)):
                waits_s[client].append(await first_token_s(client, model, prompts.write(PROMPT_TOKENS), 2))
        costs = await cpu_costs(through, _ROUTED, lambda: _gateway_cpu_s(pid), prompts, per_prompt_token_s)
    finally:
        through.close()
        direct.close()
    longer_s = float(np.median(waits_s[through][2:]) - np.median(waits_s[direct][2:]))
    work_s = costs.per_request_s + per_prompt_token_s * PROMPT_TOKENS
    work_s += costs.per_output_token_s + 2 * costs.per_wake_up_s
    return RouterCosts(
        per_request_s=_digits(max(costs.per_request_s, fixed_s)),
        per_prompt_token_s=_digits(per_prompt_token_s),
        per_output_token_s=_digits(costs.per_output_token_s),
        per_wake_up_s=_digits(costs.per_wake_up_s),
        expert_network_s=_digits(max(0.0, (longer_s - work_s) / 2)),
    )


async def cpu_costs(
    client: "LoadClient", model: str, cpu_s: Callable[[], float], prompts: Prompts, per_prompt_token_s: float
) -> CpuCosts:
    """Return what a server spends on requests, beside the tokens of their prompts.

    Args:
        client: connected to it.
        model: to ask for.
        cpu_s: tells its CPU seconds so far.
        prompts: that are sent.
        per_prompt_token_s: known otherwise.

    Raises:
        EngineGoneError: a request failed.
    """
    begin_s, before_s = time.monotonic(), cpu_s()
    await asyncio.sleep(IDLE_S)
    idle_share = (cpu_s() - before_s) / (time.monotonic() - begin_s)
    loads = [
        await _load(client, model, cpu_s, prompts, users, output)
        for users in (1, USERS)
        for output in (SHORT_OUTPUT, LONG_OUTPUT)
    ]
    return costs_of(loads, idle_share, per_prompt_token_s)


async def _load(
    client: "LoadClient",
    model: str,
    cpu_s: Callable[[], float],
    prompts: Prompts,
    users: int,
    output_tokens: int,
) -> Traffic:
    begin_s, before_s = time.monotonic(), cpu_s()

    async def user() -> int:
        requests = 0
        while time.monotonic() - begin_s < RUN_S:
            await first_token_s(client, model, prompts.write(PROMPT_TOKENS), output_tokens)
            requests += 1
        return requests

    requests = sum(await asyncio.gather(*[user() for _ in range(users)]))
    return Traffic(
        users=users,
        requests=requests,
        output_tokens=output_tokens,
        cpu_s=cpu_s() - before_s,
        took_s=time.monotonic() - begin_s,
    )


async def first_token_s(client: "LoadClient", model: str, prompt: str, output_tokens: int) -> float:
    """Send one request and wait for its end; return its time to the first token.

    Raises:
        EngineGoneError: it failed.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    exchange = client.send(json.dumps(body).encode(), f"router-{time.monotonic_ns()}", lambda _: done.set_result(None))
    await done
    if exchange.failure:
        raise EngineGoneError(f"a request to {model} failed: {exchange.failure} {exchange.detail}".strip())
    return float(exchange.first_token_s - exchange.sent_s)


def _gateway_cpu_s(pid: int) -> float:
    """CPU seconds of the gateway's processes so far, without the guard over them."""
    spent: Sequence[float | None] = [
        cpu_seconds(each) for each in processes_under(pid) if "real.processes.guard" not in command_line(each)
    ]
    return sum(each for each in spent if each is not None)


def _gateway_config(file: LoadedFleetFile, fleet: str, engine: Server) -> str:
    """The fleet's own gateway, with the one engine for every replica and without keys."""
    from real.gateway.config import gateway_config

    experts = file.fleets[fleet].experts
    config = gateway_config(file, fleet, {name: [engine.url] for name in experts})
    everyone = [each.model_copy(update={"served_model": engine.served_model}) for each in config.experts]
    serve = config.serve.model_copy(update={"api_key_env": None, "host": "127.0.0.1"})
    return config.model_copy(update={"experts": everyone, "serve": serve}).model_dump_json(indent=1)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
