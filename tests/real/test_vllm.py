"""Real vLLM servers on this machine's cores: started, asked, killed, and gone when they should be.

Each start takes half a minute of one core, so one fleet serves most of these tests.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from real.experts.checkpoints import find_checkpoint
from real.experts.cores import why_not_on_this_cpu
from real.experts.expert_server import EngineFailedError, port_is_free
from real.processes.guarded_process import child_environment
from real.serving.fleet import STATE_FILE, RunningFleet, serving
from sim.fleet_file import FleetFileError, LoadedFleetFile, parse_fleet
from sim.resolve import resolve_fleet
from tests.kit.process_tree import becomes_true, child_named, processes_of_group

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
  classes: {{chat: {{prompt_tokens: 20, output_tokens: 5}}}}
  load: {{kind: closed_loop, users: 1}}
fleets:
  one:
    experts:
      chat: {{model: laptop-16m, quantization: {quantization}, gpu: CPU, cores: 1, engine: *engine}}
serve: {{expert_port: {port}, port: {gateway_port}, metrics_port: {metrics_port}}}
"""

START_S = 400  # on a machine that is busy with other things


def fleet_file(quantization: str = "bf16") -> LoadedFleetFile:
    base = next(port for port in range(24100, 60000, 10) if all(port_is_free(port + place) for place in range(3)))
    return parse_fleet(text(quantization, base))


def text(quantization: str, base: int) -> str:
    return FILE.format(quantization=quantization, port=base, gateway_port=base + 1, metrics_port=base + 2)


def complete(url: str, prompt: str, tokens: int) -> dict[str, object]:
    body = {"model": "chat", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        found: dict[str, object] = json.load(answer)
    return found


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERT_ROUTER_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def fleet(home: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    with serving(fleet_file(), logs=tmp_path_factory.mktemp("logs"), limit_s=START_S) as running:
        yield running


def test_the_engine_has_what_the_simulation_resolved(fleet: RunningFleet) -> None:
    server = fleet.servers[0]
    settings = resolve_fleet(fleet.file, "one").experts[0].engine
    assert server.report is not None
    assert server.report.num_gpu_blocks == settings.num_kv_blocks + 1 == 65
    assert server.report.block_size == settings.block_size == 128
    assert server.report.max_model_len == settings.max_model_len
    assert (server.report.max_num_seqs, server.report.max_num_batched_tokens) == (32, 1024)
    assert server.report.async_scheduling is False
    assert server.differences() == []


def test_an_answer_has_the_length_asked_for_and_its_iterations_are_logged(fleet: RunningFleet) -> None:
    answer = complete(fleet.url, "Tell me about routers.", 12)
    usage = answer["usage"]
    assert isinstance(usage, dict)
    assert usage["completion_tokens"] == 12
    line = re.compile(
        r"Iteration\(\d+\): 1 context requests, (\d+) context tokens, 0 generation requests, 0 generation tokens, "
        r"iteration elapsed time: [\d.]+ ms"
    )
    assert becomes_true(lambda: line.search(fleet.servers[0].log.read_text()) is not None, 5)
    found = line.search(fleet.servers[0].log.read_text())
    assert found is not None
    assert int(found[1]) == usage["prompt_tokens"]


def test_an_engine_is_confined_to_its_core(fleet: RunningFleet) -> None:
    (core,) = fleet.servers[0].plan.placement.cores
    pid = fleet.servers[0].pid
    assert pid is not None
    members = processes_of_group(pid)
    assert len(members) >= 4  # the guard, the API server, the engine core, its worker
    assert {frozenset(os.sched_getaffinity(member)) for member in members} == {frozenset({core})}


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "VLLM::Worker"])
def test_an_engine_killed_is_started_again(fleet: RunningFleet, victim: str) -> None:
    watched = fleet.supervisor.experts[0]
    before, group = watched.restarts, fleet.servers[0].pid
    assert group is not None
    os.kill(child_named(group, victim), signal.SIGKILL)
    assert becomes_true(lambda: watched.restarts == before + 1, 60), watched
    assert becomes_true(lambda: not processes_of_group(group), 10)
    assert becomes_true(lambda: watched.state == "ready", START_S), watched
    assert complete(fleet.url, "Are you back?", 3)["usage"]


COMMAND = "import sys; from sim.cli import main; main(['serve', *sys.argv[1:]])"


def test_a_supervisor_killed_leaves_no_engine_behind(tmp_path: Path) -> None:
    base = fleet_file().serve.expert_port
    path = tmp_path / "fleet.yaml"
    path.write_text(text("int8", base))
    state = tmp_path / "logs" / STATE_FILE
    words = [sys.executable, "-c", COMMAND, str(path), "--logs", str(tmp_path / "logs")]
    with subprocess.Popen(words, env=child_environment({}), start_new_session=True) as process:

        def ready() -> bool:
            return state.is_file() and json.loads(state.read_text())["replicas"][0]["state"] == "ready"

        assert becomes_true(ready, START_S)
        group = json.loads(state.read_text())["replicas"][0]["pid"]
        assert child_named(group, "VLLM::Worker")
        assert complete(f"http://127.0.0.1:{base}", "Hello", 4)["usage"]
        process.kill()
    assert becomes_true(lambda: not processes_of_group(group), 10)
    assert port_is_free(base)


@pytest.mark.parametrize("quantization", ["awq", "gptq"])
def test_four_bit_experts_answer_or_are_refused_by_name(tmp_path: Path, quantization: str) -> None:
    file = fleet_file(quantization)
    if why_not_on_this_cpu(quantization) is not None:
        with pytest.raises(FleetFileError, match=rf"expert 'chat': vLLM's {quantization} kernels need AVX-512"):
            RunningFleet(file, "one", logs=tmp_path)
        return
    with serving(file, logs=tmp_path, limit_s=START_S) as running:
        assert complete(running.url, "Hello", 4)["usage"]


def test_a_failing_engine_says_why(tmp_path: Path) -> None:
    file = fleet_file()
    made = find_checkpoint("chat", file.fleets["one"].experts["chat"])
    config = Path(made.place) / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"LlamaForCausalLM"', '"FancyForCausalLM"').replace('"llama"', '"fancy"'))
    began = time.monotonic()
    try:
        with (
            pytest.raises(EngineFailedError, match=r"chat/0: vLLM does not know this model's architecture"),
            serving(file, logs=tmp_path, limit_s=START_S),
        ):
            pass
    finally:
        config.write_text(before)
    assert time.monotonic() - began < START_S
