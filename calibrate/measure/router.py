"""What the router takes: CPU seconds of the real gateway, classification over prompt length, and delay.

The gateway runs in front of one real engine under its own configuration, and users send it real text of two output
lengths; the difference is what a token costs. Classification is timed by itself, over prompt lengths. What an idle
request waits more through the gateway than without it, beyond that work, is delay on the way to the expert and back.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.measure.client import PATIENCE
from calibrate.measure.engine_under_test import EngineGoneError, EngineUnderTest
from calibrate.measure.machine import command_line, cpu_seconds, processes_under
from sim.fleet_file import LoadedFleetFile
from sim.spec import ExpertSpec
from sim.spec_base import Seconds, Spec

USERS = 8
RUN_S = 6.0
SHORT_OUTPUT, LONG_OUTPUT = 4, 64
PROMPT_TOKENS = 48
CLASSIFIED_TOKENS = (16, 64, 256, 1024)
CLASSIFY_S = 0.3
"""How long each prompt length is classified again and again."""
IDLE_REQUESTS = 15
_START_LIMIT_S = 60.0
_DRAIN_S = 5.0


class RouterCosts(Spec):
    """Figures of ``sim.spec.RouterSpec``, measured."""

    per_request_s: Seconds
    per_prompt_token_s: Seconds
    per_output_token_s: Seconds
    expert_network_s: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One stretch of traffic."""

    requests: int
    output_tokens: int
    cpu_s: float
    took_s: float


class _Prompts:
    """Real text in an exact number of tokens, each unlike the others."""

    def __init__(self, expert: ExpertSpec):
        from real.users.prompts import PromptWriter, load_tokenizer, read_corpus

        texts = [text for texts in read_corpus().values() for text in texts]
        self._writer = PromptWriter(texts, load_tokenizer(expert), nonce=time.time_ns() % 10**9)
        self._number = 0

    def write(self, tokens: int) -> str:
        from real.users.prompts import PromptRequest

        self._number += 1
        return self._writer.write([PromptRequest(tokens, self._number, self._number)])[0].text


def measure_router(
    file: LoadedFleetFile, fleet: str, expert: ExpertSpec, engine: EngineUnderTest, folder: Path
) -> RouterCosts:
    """Measure the router of a fleet in front of a running engine, in half a minute.

    Args:
        file: as loaded.
        fleet: with a router.
        expert: what the engine runs, for its tokenizer.
        engine: stands for every expert of the fleet.
        folder: for the gateway's configuration and log.

    Raises:
        EngineGoneError: the gateway did not come up, or a request through it failed.
        ValueError: the classifier or the tokenizer cannot be loaded.
    """
    from real.experts.expert_server import EngineFailedError
    from real.processes.guarded_process import LifeLine
    from real.serving.gateway_process import GatewayProcess

    prompts = _Prompts(expert)
    fixed_s, per_token_s = classification_s(file, prompts)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "gateway.json"
    config.write_text(_gateway_config(file, fleet, engine), encoding="utf-8")
    life = LifeLine()
    url = f"http://127.0.0.1:{file.serve.port}"
    gateway = GatewayProcess([sys.executable, "-m", "real.gateway", str(config)], url=url, logs=folder, life=life)
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


def classification_s(file: LoadedFleetFile, prompts: _Prompts) -> tuple[float, float]:
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


def costs_of(short: "Traffic", long: "Traffic", idle_share: float, per_prompt_token_s: float) -> tuple[float, float]:
    """Return CPU seconds a request and an output token from two loads; ``idle_share`` is the CPU of an idle gateway."""
    each_short_s = (short.cpu_s - idle_share * short.took_s) / short.requests
    each_long_s = (long.cpu_s - idle_share * long.took_s) / long.requests
    per_output_token_s = max(0.0, (each_long_s - each_short_s) / (long.output_tokens - short.output_tokens))
    work_s = per_output_token_s * short.output_tokens + per_prompt_token_s * PROMPT_TOKENS
    return max(0.0, each_short_s - work_s), per_output_token_s


async def _measure(
    url: str, engine: EngineUnderTest, pid: int, prompts: _Prompts, fixed_s: float, per_prompt_token_s: float
) -> RouterCosts:
    from real.users.load_client import LoadClient

    through, direct = LoadClient(url, PATIENCE), LoadClient(engine.url, PATIENCE)
    try:
        begin_s, before_s = time.monotonic(), _gateway_cpu_s(pid)
        await asyncio.sleep(1.5)
        idle_share = (_gateway_cpu_s(pid) - before_s) / (time.monotonic() - begin_s)
        waits_s: dict[Any, list[float]] = {through: [], direct: []}
        for _ in range(IDLE_REQUESTS):
            for client, model in ((through, "expert-router"), (direct, engine.served_model)):
                waits_s[client].append(await _ask(client, model, prompts, 2))
        loads = [await _load(through, pid, prompts, output) for output in (SHORT_OUTPUT, LONG_OUTPUT)]
    finally:
        through.close()
        direct.close()
    per_request_s, per_output_token_s = costs_of(loads[0], loads[1], idle_share, per_prompt_token_s)
    longer_s = float(np.median(waits_s[through][2:]) - np.median(waits_s[direct][2:]))
    work_s = per_request_s + per_prompt_token_s * PROMPT_TOKENS + per_output_token_s
    return RouterCosts(
        per_request_s=_digits(max(per_request_s, fixed_s)),
        per_prompt_token_s=_digits(per_prompt_token_s),
        per_output_token_s=_digits(per_output_token_s),
        expert_network_s=_digits(max(0.0, (longer_s - work_s) / 2)),
    )


async def _load(client: Any, pid: int, prompts: _Prompts, output_tokens: int) -> Traffic:
    begin_s, before_s = time.monotonic(), _gateway_cpu_s(pid)

    async def user() -> int:
        requests = 0
        while time.monotonic() - begin_s < RUN_S:
            await _ask(client, "expert-router", prompts, output_tokens)
            requests += 1
        return requests

    requests = sum(await asyncio.gather(*[user() for _ in range(USERS)]))
    return Traffic(
        requests=requests,
        output_tokens=output_tokens,
        cpu_s=_gateway_cpu_s(pid) - before_s,
        took_s=time.monotonic() - begin_s,
    )


async def _ask(client: Any, model: str, prompts: _Prompts, output_tokens: int) -> float:
    """Send one request; return its time to the first token.

    Raises:
        EngineGoneError: it failed.
    """
    body = {
        "model": model,
        "prompt": prompts.write(PROMPT_TOKENS),
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


def _gateway_config(file: LoadedFleetFile, fleet: str, engine: EngineUnderTest) -> str:
    """The fleet's own gateway, with the one engine for every replica and without keys."""
    from real.gateway.config import gateway_config

    experts = file.fleets[fleet].experts
    config = gateway_config(file, fleet, {name: [engine.url] for name in experts})
    everyone = [each.model_copy(update={"served_model": engine.served_model}) for each in config.experts]
    serve = config.serve.model_copy(update={"api_key_env": None, "host": "127.0.0.1"})
    return config.model_copy(update={"experts": everyone, "serve": serve}).model_dump_json(indent=1)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
