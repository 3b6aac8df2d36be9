"""Real vLLM servers on this machine's cores: started, asked, killed, and gone when they should be.

Each start takes half a minute of one core, so one fleet, which has no router, serves most of these tests, until the
last of them kills what keeps it.
"""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from real.experts.checkpoints import find_checkpoint
from real.experts.cores import why_not_on_this_cpu
from real.experts.expert_server import EngineFailedError
from real.processes.ports import port_is_free
from real.serving.fleet import RunningFleet, serving
from sim.fleet_file import FleetFileError, LoadedFleetFile, load_fleet
from tests.kit.process_tree import becomes_true, child_named, is_alive, processes_of_group
from tests.kit.served_fleet import START_S, ServedFleet, free_ports

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make install-cpu)"),
]

FILE = """
x-engine: &engine
  max_model_len: 2048
  max_num_seqs: 32
  max_num_batched_tokens: 1024
  block_size: 128
  num_gpu_blocks_override: 65
  enforce_eager: true
  async_scheduling: false
  generation_config: vllm
workload:
  classes: {chat: {prompt_tokens: 20, output_tokens: 5}}
  load: {kind: closed_loop, users: 1}
fleets:
  one:
    experts:
      chat: {model: laptop-16m, gpu: CPU, cores: 1, engine: *engine}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERT_ROUTER_HOME", str(tmp_path_factory.mktemp("home")))
        path = tmp_path_factory.mktemp("file") / "fleet.yaml"
        path.write_text(FILE)
        yield str(path)


@pytest.fixture(scope="module")
def fleet(file: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedFleet]:
    served = ServedFleet(file, folder=tmp_path_factory.mktemp("served"))
    try:
        served.wait_until_ready()
        yield served
    finally:
        served.close()


def loaded(file: str, quantization: str = "bf16") -> LoadedFleetFile:
    return load_fleet(file, (*free_ports(24100), f"fleets.one.experts.chat.quantization={quantization}"))


def complete(url: str, prompt: str, tokens: int) -> dict[str, int]:
    """Ask an expert for an answer, and return its usage figures."""
    body = {"model": "chat", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        usage: dict[str, int] = json.load(answer)["usage"]
    return usage


def test_the_engine_has_what_the_simulation_resolved(fleet: ServedFleet) -> None:
    told = (fleet.logs / "serve.log").read_text()
    # The row of the table: KV blocks, block, sequences, tokens, longest; a difference would be a line of its own.
    assert re.search(r"^ *chat/0 .* 65 +128 +32 +1024 +2048 +0\.\d", told.replace("│", " "), re.MULTILINE), told
    assert "the simulation" not in told


def test_an_answer_has_the_length_asked_for_and_its_iterations_are_logged(fleet: ServedFleet) -> None:
    usage = complete(fleet.replica("chat")["url"], "Tell me about routers.", 12)
    assert usage["completion_tokens"] == 12
    line = re.compile(
        r"Iteration\(\d+\): 1 context requests, (\d+) context tokens, 0 generation requests, 0 generation tokens, "
        r"iteration elapsed time: [\d.]+ ms"
    )
    log = fleet.logs / "chat-0.log"
    fleet.wait(lambda: line.search(log.read_text()) is not None, 5, "the engine to log its iterations")
    found = line.search(log.read_text())
    assert found is not None
    assert int(found[1]) == usage["prompt_tokens"]


def test_an_engine_is_confined_to_one_core(fleet: ServedFleet) -> None:
    members = processes_of_group(fleet.replica("chat")["pid"])
    assert len(members) >= 4  # the guard, the API server, the engine core, its worker
    (cores,) = {frozenset(os.sched_getaffinity(member)) for member in members}
    assert len(cores) == 1


def test_an_engine_whose_worker_is_killed_is_started_again(fleet: ServedFleet) -> None:
    group = fleet.replica("chat")["pid"]
    os.kill(child_named(group, "VLLM::Worker"), signal.SIGKILL)
    fleet.wait(lambda: fleet.replica("chat")["restarts"] == 1, 60, "the supervisor to start the engine again")
    assert becomes_true(lambda: not processes_of_group(group), 10)
    fleet.wait(lambda: fleet.replica("chat")["state"] == "ready", START_S, "the engine to be back")
    assert complete(fleet.replica("chat")["url"], "Are you back?", 3)["completion_tokens"] == 3


def test_a_supervisor_killed_leaves_nothing_behind(fleet: ServedFleet) -> None:
    processes = fleet.processes()
    assert any(path.is_socket() for path in fleet.temporary.rglob("*"))
    fleet.process.kill()
    assert becomes_true(lambda: not any(map(is_alive, processes[1:])), 10)
    assert becomes_true(lambda: not list(fleet.temporary.iterdir()), 5)
    assert port_is_free(fleet.port + 2)


@pytest.mark.parametrize("quantization", ["awq", "gptq"])
def test_four_bit_experts_answer_or_are_refused_by_name(file: str, tmp_path: Path, quantization: str) -> None:
    if why_not_on_this_cpu(quantization) is not None:
        with pytest.raises(FleetFileError, match=rf"expert 'chat': vLLM's {quantization} kernels need AVX-512"):
            RunningFleet(loaded(file, quantization), "one", logs=tmp_path)
        return
    with serving(loaded(file, quantization), logs=tmp_path, limit_s=START_S) as running:
        assert complete(running.url, "Hello", 4)["completion_tokens"] == 4


def test_a_failing_engine_says_why(file: str, tmp_path: Path) -> None:
    fleet_file = loaded(file)
    made = find_checkpoint("chat", fleet_file.fleets["one"].experts["chat"])
    config = Path(made.place) / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"LlamaForCausalLM"', '"FancyForCausalLM"').replace('"llama"', '"fancy"'))
    began = time.monotonic()
    try:
        with (
            pytest.raises(EngineFailedError, match=r"chat/0: vLLM does not know this model's architecture"),
            serving(fleet_file, logs=tmp_path, limit_s=START_S),
        ):
            pass
    finally:
        config.write_text(before)
    assert time.monotonic() - began < START_S
