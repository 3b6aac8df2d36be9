"""A fleet is started, kept running and stopped whole; stand-ins take the places of vLLM and the gateway."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

import real.serving.supervisor
from calibrate.measure.engine_under_test import EngineGoneError, served_by
from real.experts.checkpoints import Checkpoint
from real.experts.expert_server import EngineFailedError, ExpertServer
from real.processes.guarded_process import child_environment
from real.processes.ports import port_is_free
from real.serving.fleet import STATE_FILE, RunningFleet, engines_of, read_state, serving
from sim.cli import main
from sim.fleet_file import FleetFileError, LoadedFleetFile, parse_fleet
from sim.spec import ExpertSpec
from tests.kit.client import Client, Reply, play
from tests.kit.process_tree import becomes_true, child_named, is_alive, processes_of_group
from tests.kit.processes import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guards adopt orphans on Linux only")

STAND_INS = Path(__file__).parent / "kit" / "stand_ins"

FILE = """
x-engine: &engine {max_model_len: 2048, block_size: 128, num_gpu_blocks_override: 33, async_scheduling: false}
workload:
  classes:
    code: {prompt_tokens: 20, output_tokens: 5}
    chat: {prompt_tokens: 20, output_tokens: 5}
  load: {kind: closed_loop, users: 1}
fleets:
  routed:
    router: {}
    experts:
      code: {model: laptop-37m, gpu: CPU, engine: *engine}
      chat: {model: laptop-16m, gpu: CPU, replicas: 2, engine: *engine}
  direct:
    experts:
      code: {model: laptop-37m, gpu: CPU, engine: *engine}
"""


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    monkeypatch.setenv("STAND_IN_FAILS", str(tmp_path / "fails"))
    checkpoint = Checkpoint(place="/models/m", random_weights=True, told="random weights")
    monkeypatch.setattr("real.serving.fleet.find_checkpoint", lambda name, expert: checkpoint)
    command = [sys.executable, str(STAND_INS / "stand_in_gateway.py")]
    monkeypatch.setattr(RunningFleet, "_gateway_command", lambda fleet: command)
    monkeypatch.setattr(real.serving.supervisor, "FIRST_WAIT_S", 0.05)


@pytest.fixture
def file(unused_ports: Callable[[int], int]) -> LoadedFleetFile:
    first = unused_ports(5)
    serve = f"serve: {{expert_port: {first}, port: {first + 3}, metrics_port: {first + 4}, drain_s: 5}}\n"
    return parse_fleet(FILE + serve)


@pytest.fixture
def unused_ports() -> Callable[[int], int]:
    def find(count: int) -> int:
        for first in range(23000 + os.getpid() % 1000 * 8, 60000, 8):
            if all(port_is_free(port) for port in range(first, first + count)):
                return first
        raise AssertionError("no ports are free")

    return find


def groups_of(fleet: RunningFleet) -> list[int]:
    return [each.service.pid for each in fleet.supervisor.watched if each.service.pid is not None]


def nobody_is_left(groups: list[int]) -> bool:
    return becomes_true(lambda: not any(processes_of_group(group) for group in groups), 15)


def test_a_fleet_serves_while_the_block_runs_and_nothing_is_left_after_it(
    file: LoadedFleetFile, tmp_path: Path
) -> None:
    told: list[str] = []
    with serving(file, "routed", logs=tmp_path, tell=told.append) as fleet:
        groups = groups_of(fleet)
        assert len(groups) == 4
        assert fleet.url == f"http://127.0.0.1:{file.serve.port}"
        assert [(address.expert, address.replica) for address in fleet.replicas] == [
            ("code", 0),
            ("chat", 0),
            ("chat", 1),
        ]
        assert list(fleet.replica_urls) == ["code", "chat"]
        state = read_state(tmp_path)
        assert state is not None
        assert [replica["state"] for replica in state["replicas"]] == ["ready"] * 3
        assert (state["gateway"]["state"], state["url"]) == ("ready", fleet.url)
        assert all(is_alive(child_named(group, "sleep(600)")) for group in groups[:3])
    assert nobody_is_left(groups)
    assert read_state(tmp_path) is None
    assert {path.name for path in tmp_path.glob("*.log")} == {"code-0.log", "chat-0.log", "chat-1.log", "gateway.log"}
    assert (tmp_path / "gateway.log").read_text().endswith("draining\ndrained\n")
    assert any(line.startswith("gateway: ready after") for line in told)
    assert told[:2] == ["code: random weights", "chat: random weights"]
    assert f"starting 3 engine(s), logs in {tmp_path}" in told


def test_a_fleet_without_a_router_is_its_expert(file: LoadedFleetFile, tmp_path: Path) -> None:
    with serving(file, "direct", logs=tmp_path) as fleet:
        assert fleet.url == fleet.replicas[0].url
        report = fleet.servers[0].report
        assert report is not None
        assert (report.num_gpu_blocks, report.block_size, report.max_model_len) == (33, 128, 2048)
        assert fleet.servers[0].differences() == []


def test_without_the_gateway_the_experts_are_talked_to(file: LoadedFleetFile, tmp_path: Path) -> None:
    with serving(file, "routed", logs=tmp_path, gateway=False) as fleet:
        assert fleet.url == fleet.replicas[0].url
        assert len(groups_of(fleet)) == 3


def test_engines_can_be_measured_before_the_gateway_is_there(file: LoadedFleetFile, tmp_path: Path) -> None:
    fleet = RunningFleet(file, "routed", logs=tmp_path)
    with engines_of(fleet):
        gateway = fleet.supervisor.gateway
        assert gateway is not None
        assert (gateway.state, gateway.service.pid) == ("new", None)
        start = served_by(fleet)
        chat = file.fleets["routed"].experts["chat"]
        engine = start("chat", chat, (), 0, tmp_path)
        assert (engine.url, engine.served_model) == (fleet.replica_urls["chat"][0], "chat")
        assert (engine.facts.num_gpu_blocks, engine.facts.settings.block_size) == (33, 128)
        engine.stop()
        assert engine.is_running(), "it is the fleet's"

        server = fleet.servers[1]
        assert server.pid is not None
        os.kill(child_named(server.pid, "vllm.entrypoints"), signal.SIGKILL)
        start("chat", chat, (), 0, tmp_path)
        assert fleet.supervisor.experts[1].restarts == 1, "it was not waited for"

        fleet.start_gateway()
        assert gateway.state == "ready"
        groups = groups_of(fleet)
        assert len(groups) == 4
    assert nobody_is_left(groups)


def test_an_engine_that_is_given_up_cannot_be_measured(
    file: LoadedFleetFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real.serving.supervisor, "RESTARTS", 1)
    fleet = RunningFleet(file, "direct", logs=tmp_path)
    with engines_of(fleet):
        (tmp_path / "fails").write_text("ValueError: the disk is on fire")
        assert fleet.servers[0].pid is not None
        os.kill(child_named(fleet.servers[0].pid, "vllm.entrypoints"), signal.SIGKILL)
        with pytest.raises(EngineGoneError, match="the disk is on fire"):
            served_by(fleet)("code", file.fleets["direct"].experts["code"], (), 0, tmp_path)


@pytest.mark.parametrize("victim", ["api_server", "guard"])
def test_what_is_killed_is_started_again(file: LoadedFleetFile, tmp_path: Path, victim: str) -> None:
    told: list[str] = []
    with serving(file, "routed", logs=tmp_path, tell=told.append) as fleet:
        server = fleet.servers[1]
        group = server.pid
        assert group is not None
        os.kill(group if victim == "guard" else child_named(group, "vllm.entrypoints"), signal.SIGKILL)
        watched = fleet.supervisor.experts[1]
        assert becomes_true(lambda: watched.restarts == 1 and watched.state == "ready", 15)
        assert nobody_is_left([group])
        assert server.is_ready()
        assert any("chat/0: it was killed (signal 9)" in line and "Starting it again" in line for line in told), told
        assert any(line.startswith("chat/0: serves again after") for line in told)
        assert fleet.supervisor.failure is None


def test_a_gateway_that_is_killed_is_started_again(file: LoadedFleetFile, tmp_path: Path) -> None:
    with serving(file, "routed", logs=tmp_path) as fleet:
        gateway = fleet.supervisor.gateway
        assert gateway is not None
        assert gateway.service.pid is not None
        os.kill(child_named(gateway.service.pid, "stand_in_gateway"), signal.SIGKILL)
        assert becomes_true(lambda: gateway.restarts == 1 and gateway.state == "ready", 15)


def test_what_dies_too_often_stays_down(file: LoadedFleetFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real.serving.supervisor, "RESTARTS", 2)
    told: list[str] = []
    with serving(file, "direct", logs=tmp_path, tell=told.append) as fleet:
        (tmp_path / "fails").write_text("ValueError: the disk is on fire")
        group = fleet.servers[0].pid
        assert group is not None
        os.kill(child_named(group, "vllm.entrypoints"), signal.SIGKILL)
        assert fleet.supervisor.wait(20)
        assert fleet.supervisor.failure == "code/0 could not be kept running"
        assert any("the disk is on fire" in line and "died 3 times" in line for line in told), told


def test_a_start_that_fails_stops_everything_and_says_why(file: LoadedFleetFile, tmp_path: Path) -> None:
    (tmp_path / "fails").write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    fleet = RunningFleet(file, "routed", logs=tmp_path)
    # All fail, and whichever is seen to first is told.
    with pytest.raises(EngineFailedError, match=r"(\w+)/0: the model is too large .*out of memory.*; log: .*\1-0\.log"):
        fleet.start()
    assert nobody_is_left(groups_of(fleet))
    fleet.stop()


def test_a_start_that_takes_too_long_is_given_up(
    file: LoadedFleetFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_START_S", "60")
    with (
        pytest.raises(EngineFailedError, match=r"code/0: no answer after 1 s \(LlamaForCausalLM\)|\(starting\)"),
        serving(file, "direct", logs=tmp_path, limit_s=1),
    ):
        pass


def test_a_port_in_use_is_said_before_anything_starts(file: LoadedFleetFile, tmp_path: Path) -> None:
    with serving(file, "direct", logs=tmp_path / "first"):
        fleet = RunningFleet(file, "routed", logs=tmp_path / "second")
        with pytest.raises(EngineFailedError, match=rf"port {file.serve.expert_port} is in use; set serve.expert_port"):
            fleet.start()
        assert groups_of(fleet) == []
        fleet.stop()


def test_a_fleet_that_is_refused_leaves_the_files_of_the_one_that_runs(
    file: LoadedFleetFile, tmp_path: Path, unused_ports: Callable[[int], int]
) -> None:
    with serve_command(file, tmp_path, STAND_INS / "stand_in_gateway.py"):
        logs = tmp_path / "logs"
        before = {path.name: path.read_text() for path in logs.iterdir()}
        with pytest.raises(EngineFailedError, match="is in use"), serving(file, "routed", logs=logs):
            pass
        first = unused_ports(5)
        ports = {"expert_port": first, "port": first + 3, "metrics_port": first + 4}
        elsewhere = file.model_copy(update={"serve": file.serve.model_copy(update=ports)})
        told = pytest.raises(
            EngineFailedError, match=r"a fleet that runs \(process \d+\) has its logs in .*; give another"
        )
        with told, serving(elsewhere, "routed", logs=logs):
            pass
        assert {path.name: path.read_text() for path in logs.iterdir()} == before
        assert read_state(logs) is not None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"metrics_port": 23001}, "serve.metrics_port and serve.port both come to 23001, 3 replicas counting up from"),
        ({"port": 23007}, "serve.port and serve.expert_port both come to 23007, 3 replicas counting up from 23006"),
        ({"expert_port": 65534}, "serve.expert_port 65534 leaves no ports for 3 replicas"),
    ],
)
def test_ports_that_cannot_be_are_told_before_anything_starts(
    file: LoadedFleetFile, tmp_path: Path, change: dict[str, int], says: str
) -> None:
    ports = {"port": 23001, "metrics_port": 23002, "expert_port": 23006, **change}
    with pytest.raises(FleetFileError, match=says):
        RunningFleet(file.model_copy(update={"serve": file.serve.model_copy(update=ports)}), "routed", logs=tmp_path)


def test_the_vllm_for_cpus_is_not_given_an_expert_of_a_gpu(
    file: LoadedFleetFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = {"code": ExpertSpec(model="llama-3-8b", gpu="H100-SXM")}
    fleet = file.fleets["direct"].model_copy(update={"experts": experts})
    other = file.model_copy(update={"fleets": {"direct": fleet}})
    monkeypatch.setattr("real.serving.fleet.only_cpu_build", lambda: True)
    with pytest.raises(FleetFileError, match="expert 'code': gpu is H100-SXM, and the vLLM that is installed is the"):
        RunningFleet(other, "direct", logs=tmp_path)
    monkeypatch.setattr("real.serving.fleet.only_cpu_build", lambda: False)
    assert RunningFleet(other, "direct", logs=tmp_path).plans[0].placement.gpus == (0,)


def test_of_two_fleets_that_start_at_once_one_is_refused(
    file: LoadedFleetFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_START_S", "3")
    first = RunningFleet(file, "direct", logs=tmp_path / "first")
    second = RunningFleet(file, "routed", logs=tmp_path / "second")
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(first.start)
        assert becomes_true(lambda: first.servers[0].is_running, 10)
        assert port_is_free(file.serve.expert_port)  # so it seems until the engine listens
        with pytest.raises(EngineFailedError, match=rf"port {file.serve.expert_port} is another fleet's; set serve"):
            second.start()
        second.stop()
        starting.result()
    first.stop()
    with serving(file, "direct", logs=tmp_path / "third"):
        pass


def test_somebody_else_who_answers_on_its_port_does_not_make_an_engine_ready(
    file: LoadedFleetFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_START_S", "2")
    fleet = RunningFleet(file, "direct", logs=tmp_path)
    server = fleet.servers[0]
    server.start()
    with HTTPServer(("127.0.0.1", file.serve.expert_port), Healthy) as other:
        thread = threading.Thread(target=other.serve_forever, daemon=True)
        thread.start()
        with pytest.raises(EngineFailedError, match=r"code/0: its port is in use \(.*Address already in use\); log"):
            server.wait_until_ready(30)
        other.shutdown()
        thread.join()
    fleet.stop()


class Healthy(BaseHTTPRequestHandler):
    """Calls itself healthy, whoever it is."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *values: object) -> None:
        """Say nothing."""


def test_a_gateway_for_the_world_without_keys_is_refused_before_anything_starts(
    file: LoadedFleetFile, tmp_path: Path
) -> None:
    serve = file.serve.model_copy(update={"host": "0.0.0.0"})
    fleet = RunningFleet(file.model_copy(update={"serve": serve}), "routed", logs=tmp_path)
    with pytest.raises(EngineFailedError, match=r"gateway: .*api_key_env"):
        fleet.start()
    assert groups_of(fleet) == []
    fleet.stop()


def test_a_fleet_that_is_not_there(file: LoadedFleetFile, tmp_path: Path) -> None:
    with pytest.raises(FleetFileError, match="no fleet 'routd' in the file, did you mean 'routed'"):
        RunningFleet(file, "routd", logs=tmp_path)
    with pytest.raises(FleetFileError, match="several fleets, name one with --fleet: routed, direct"), serving(file):
        pass


def test_a_classifier_that_does_not_know_the_classes_is_told_before_anything_starts(
    file: LoadedFleetFile, tmp_path: Path
) -> None:
    classes = {"gossip": file.workload.classes["code"], "chat": file.workload.classes["chat"]}
    workload = file.workload.model_copy(update={"classes": classes})
    fleet = file.fleets["routed"].model_copy(update={"class_map": {"gossip": ["code"], "chat": ["chat"]}})
    other = file.model_copy(update={"workload": workload, "fleets": {"routed": fleet}})
    with pytest.raises(FleetFileError, match="classifier: knows no class 'gossip'"):
        RunningFleet(other, "routed", logs=tmp_path)


def test_told_to_stop_in_the_moment_in_which_it_is_ready_it_drains(file: LoadedFleetFile, tmp_path: Path) -> None:
    def tell(line: str) -> None:
        if line.startswith("gateway: ready"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), serving(file, "routed", logs=tmp_path, tell=tell):
        pass
    assert (tmp_path / "gateway.log").read_text().endswith("drained\n")


def test_an_unready_server_is_not_ready(file: LoadedFleetFile, tmp_path: Path) -> None:
    fleet = RunningFleet(file, "direct", logs=tmp_path)
    server: ExpertServer = fleet.servers[0]
    server.start()
    stages: list[str] = []
    report = server.wait_until_ready(30, stages.append)
    assert report.version == "0.0.stand-in"
    server.stop()
    assert not server.is_running
    fleet.stop()


# -------------------------------------------------------------------------------------------------------- the command

COMMAND = """
import sys
from real.experts.checkpoints import Checkpoint
import real.serving.fleet
checkpoint = Checkpoint(place="/m", random_weights=True, told="random weights")
real.serving.fleet.find_checkpoint = lambda name, expert: checkpoint
from sim.cli import main
"""
STAND_IN_GATEWAY = """
real.serving.fleet.RunningFleet._gateway_command = lambda fleet: [sys.executable, {gateway!r}]
"""


@dataclass
class Serve:
    """``expert-router serve`` in a process of its own, up and running.

    Attributes:
        experts: groups of their processes.
        gateway: the group of its processes.
    """

    process: subprocess.Popen[str]
    port: int
    experts: list[int]
    gateway: int

    @property
    def groups(self) -> list[int]:
        return [*self.experts, self.gateway]


@contextlib.contextmanager
def serve_command(file: LoadedFleetFile, tmp_path: Path, gateway: Path | None, **serve: object) -> Iterator[Serve]:
    """Run ``expert-router serve`` with a stand-in for the gateway, or with the real one."""
    path = tmp_path / "fleet.yaml"
    spec = file.serve.model_copy(update=serve)
    path.write_text(FILE + f"serve: {spec.model_dump_json()}\n")
    script = tmp_path / "command.py"
    script.write_text(
        COMMAND + (STAND_IN_GATEWAY.format(gateway=str(gateway)) if gateway is not None else "") + "main()\n"
    )
    words = [sys.executable, str(script), "serve", str(path), "--fleet", "routed", "--logs", str(tmp_path / "logs")]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=child_environment({"COLUMNS": "150"}),
        start_new_session=True,
    ) as process:
        state = tmp_path / "logs" / STATE_FILE
        up = becomes_true(
            lambda: state.is_file() and (json.loads(state.read_text())["gateway"] or {}).get("state") == "ready", 30
        )
        if not up:
            process.kill()
            pytest.fail(process.communicate()[0])
        running = json.loads(state.read_text())
        experts = [each["pid"] for each in running["replicas"]]
        try:
            yield Serve(process, spec.port, experts, running["gateway"]["pid"])
        finally:
            process.kill()


@pytest.fixture
def command(file: LoadedFleetFile, tmp_path: Path) -> Iterator[Serve]:
    """The command with a stand-in for the gateway."""
    with serve_command(file, tmp_path, STAND_INS / "stand_in_gateway.py") as running:
        yield running


def test_ctrl_c_drains_and_leaves_nothing(command: Serve, tmp_path: Path) -> None:
    process = command.process
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0, output
    assert nobody_is_left(command.groups)
    assert "fleet 'routed' at http://127.0.0.1" in output
    assert "curl http://127.0.0.1" in output
    assert "stopping: answers in flight may finish" in output
    assert (tmp_path / "logs" / "gateway.log").read_text().endswith("drained\n")


def test_a_supervisor_that_is_killed_leaves_nothing(command: Serve) -> None:
    assert all(processes_of_group(group) for group in command.groups)
    command.process.kill()
    assert nobody_is_left(command.groups)


async def stopped_while_streaming(running: Serve, client: Client, *, tokens: int, signals: int = 1) -> list[Reply]:
    """Tell ``serve`` to stop while streams are open; return what these came to.

    As long as a process of the gateway lives, every expert must.
    """
    streams = [asyncio.create_task(client.complete("x", model="code", max_tokens=tokens)) for _ in range(12)]
    replies = client.replies
    await until(lambda: len(replies) == 12 and all(reply.times_s for reply in replies), timeout_s=20)
    assert {reply.status for reply in replies} == {200}
    for _ in range(signals):
        running.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
    while running.process.poll() is None:
        experts_live = [bool(processes_of_group(group)) for group in running.experts]
        if signals == 1 and processes_of_group(running.gateway):
            assert all(experts_live), "an expert has been stopped before the gateway was done"
        await asyncio.sleep(0.02)
    return list(await asyncio.gather(*streams))


def test_streams_finish_when_serve_is_told_to_stop(file: LoadedFleetFile, tmp_path: Path) -> None:
    with serve_command(file, tmp_path, None, drain_s=20.0) as running:
        replies: list[Reply] = []

        async def story(client: Client) -> None:
            await stopped_while_streaming(running, client, tokens=40)

        play(running.port, story, replies)
        output = running.process.communicate(timeout=30)[0]
        assert running.process.returncode == 0, output
        assert nobody_is_left(running.groups)
        assert {reply.outcome for reply in replies} == {"completed"}
        assert {reply.body.count(b'"text": " word') for reply in replies} == {40}


def test_streams_that_outlast_the_drain_are_told_so_before_experts_are_stopped(
    file: LoadedFleetFile, tmp_path: Path
) -> None:
    with serve_command(file, tmp_path, None, drain_s=1.0) as running:
        replies: list[Reply] = []

        async def story(client: Client) -> None:
            await stopped_while_streaming(running, client, tokens=10_000)

        play(running.port, story, replies)
        output = running.process.communicate(timeout=30)[0]
        assert running.process.returncode == 0, output
        assert nobody_is_left(running.groups)
        assert {(reply.end, reply.errors, reply.is_done) for reply in replies} == {("clean", 1, True)}


def test_a_second_signal_ends_serve_at_once(file: LoadedFleetFile, tmp_path: Path) -> None:
    with serve_command(file, tmp_path, None, drain_s=60.0) as running:
        replies: list[Reply] = []

        async def story(client: Client) -> None:
            began_s = time.monotonic()
            await stopped_while_streaming(running, client, tokens=10_000, signals=2)
            assert time.monotonic() - began_s < 15

        play(running.port, story, replies)
        assert running.process.wait(30) == 0
        assert nobody_is_left(running.groups)
        assert {reply.end for reply in replies} <= {"clean", "cut"}
        assert "completed" not in {reply.outcome for reply in replies}


def test_a_mistake_in_the_file_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(FILE)
    result = CliRunner().invoke(main, ["serve", str(path), "--logs", str(tmp_path / "logs")])
    assert result.exit_code == 2
    assert result.stderr == "the file has several fleets, name one with --fleet: routed, direct\n"
