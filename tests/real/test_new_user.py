"""What a new user would do with two real vLLM experts, and what may happen to them meanwhile.

One fleet serves all of it, started once by ``expert-router serve examples/laptop.yaml`` with a router fitted for it.
The tests that hurt it come last, and the last of all stops it.
"""

import asyncio
import contextlib
import csv
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import pandas as pd
import pytest
from tokenizers import Tokenizer

from calibrate.tables.bench_results import read_bench_results
from calibrate.tables.measured_runs import run_of_settings
from real.experts.reference_models import default_folder
from real.processes.guarded_process import child_environment
from real.processes.ports import port_is_free
from real.router.classifier import fitted_classifier, read_packaged
from real.router.router_file import read_router_file
from real.serving.fleet import STATE_FILE
from sim.report import number_text
from tests.kit.client import Client, Reply, play
from tests.kit.ledger import check_ledger
from tests.kit.process_tree import becomes_true, child_named, is_alive
from tests.kit.processes import until
from tests.kit.served_fleet import START_S, ServedFleet
from tests.real_fleet import ROOT, cli

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make install-cpu)"),
]

LAPTOP = str(ROOT / "examples" / "laptop.yaml")
EXPERTS = ("code", "chat")
PROMPTS = {
    "code": "Write a Python function that reverses a linked list, with unit tests, and fix the bug in this loop.",
    "chat": "I had a rough week and feel lonely. What should I cook for dinner with my friends on Sunday?",
}
STREAM_S = 240.0  # for an answer, on a machine that is busy with other things
CORPUS = [json.loads(line) for line in (ROOT / "real/router/data/prompts.jsonl").read_text().splitlines()]
TEXTS = [(row["class"], row["text"]) for row in CORPUS if row["class"] in EXPERTS]
FITTED, UNSEEN = TEXTS[::2], TEXTS[1::2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERT_ROUTER_HOME", str(tmp_path_factory.mktemp("home")))
        yield tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def router_file(folder: Path) -> Path:
    prompts, out = folder / "prompts.jsonl", folder / "router.npz"
    prompts.write_text("".join(json.dumps({"text": text, "class": name}) + "\n" for name, text in FITTED))
    told = user("router", "fit", str(prompts), "--centres", "labels", "--out", str(out))
    assert re.search(r"of prompts held out ([\d.]+)%", told), told
    return out


@pytest.fixture(scope="module")
def fleet(folder: Path, router_file: Path) -> Iterator[ServedFleet]:
    classifier = ("serve.classifier.kind=tfidf", f"serve.classifier.file={router_file}")
    settings = (*classifier, "fleets.laptop.router.workers=2")
    served = ServedFleet(LAPTOP, *(word for setting in settings for word in ("--set", setting)), folder=folder)
    try:
        served.wait_until_ready()
        yield served
    finally:
        served.close()


def user(*arguments: str, timeout_s: float = 300.0) -> str:
    """Run a command of ours and return what it printed."""
    found = subprocess.run(
        cli(arguments),
        cwd=ROOT,
        env=child_environment({}),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert found.returncode == 0, f"{' '.join(arguments)}: {found.stdout}{found.stderr}"
    return found.stdout


def documented(begin: str) -> str:
    """A piece of docs/running.md: a block of Python, or a command of one or several lines."""
    page = (ROOT / "docs" / "running.md").read_text()
    if begin == "```python":
        return page.partition(f"{begin}\n")[2].partition("```")[0]
    command = page[page.index(f"\n    {begin}") :].partition("\n\n")[0]
    return command.replace("\\\n", " ")


# ------------------------------------------------------------------------------------------------------ requests


def tell(fleet: ServedFleet, story: Callable[[Client], Awaitable[None]]) -> tuple[list[Reply], list[dict[str, Any]]]:
    """Run a story with a client of the gateway; return its replies and the gateway's lines about them."""
    known, replies = len(fleet.request_log()), list[Reply]()
    play(fleet.port, story, replies)
    fleet.wait(fleet.is_quiet, 30, "gateway and engines to have nothing under way")
    return replies, fleet.request_log()[known:]


def answer(client: Client, prompt: str, tokens: int, **fields: Any) -> asyncio.Task[Reply]:
    """Ask for an answer of so many tokens."""
    body = {"model": "expert-router", "ignore_eos": True, "stream_options": {"include_usage": True}, **fields}
    return asyncio.create_task(client.complete(prompt, max_tokens=tokens, timeout_s=STREAM_S, **body))


async def under_way(client: Client, count: int, chunks: int = 3) -> None:
    """Wait until so many answers have begun to come."""
    await until(
        lambda: sum(len(reply.times_s) >= chunks for reply in client.replies) >= count,
        STREAM_S,
        what=f"{count} streams to have had {chunks} chunks",
    )


def expert_of(reply: Reply) -> str:
    return reply.headers.get("x-expert-router-expert", "")


def usage_of(reply: Reply) -> dict[str, int]:
    """Of a whole stream, by the engine's account, which comes last."""
    found: dict[str, int] = json.loads(reply.events[-2].removeprefix(b"data: "))["usage"]
    return found


# ------------------------------------------------------------------------------------------------------------ tests


def test_the_router_that_was_fitted_decides(fleet: ServedFleet, router_file: Path) -> None:
    mine = fitted_classifier(read_router_file(router_file), "mine", EXPERTS)
    packaged = fitted_classifier(read_packaged(), "packaged", EXPERTS)
    apart = [pair for pair in UNSEEN if mine.classify(pair[1]) != packaged.classify(pair[1])]
    assert apart, "no prompt tells this router from the packaged one"
    chosen = list(dict.fromkeys([*apart[:8], *UNSEEN[:16]]))

    async def story(client: Client) -> None:
        await asyncio.gather(*(answer(client, text, 1) for _, text in chosen))

    replies, lines = tell(fleet, story)
    assert check_ledger(replies, lines) == {"completed": len(chosen)}
    wanted = [EXPERTS[mine.classify(text)] for _, text in chosen]
    assert [reply.headers["x-expert-router-class"] for reply in replies] == wanted
    assert [expert_of(reply) for reply in replies] == wanted
    right = sum(name == EXPERTS[mine.classify(text)] for name, text in UNSEEN) / len(UNSEEN)
    print(f"{right:.0%} of {len(UNSEEN)} prompts that it was not fitted to are rightly routed, {len(apart)} otherwise")
    assert right > 0.7


@pytest.fixture
def client(fleet: ServedFleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0, timeout=STREAM_S) as made:
        yield made


@pytest.mark.parametrize("expert", EXPERTS)
def test_an_openai_client_completes(client: openai.OpenAI, expert: str) -> None:
    tokenizer = Tokenizer.from_file(str(default_folder("laptop-16m", "int8") / "tokenizer.json"))
    prompt_tokens = len(tokenizer.encode(PROMPTS[expert]).ids)
    more = {"ignore_eos": True}
    whole = client.completions.create(model="expert-router", prompt=PROMPTS[expert], max_tokens=12, extra_body=more)
    assert whole.model == expert
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt_tokens, 12)
    chunks = list(
        client.completions.create(
            model="expert-router",
            prompt=PROMPTS[expert],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=more,
        )
    )
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (prompt_tokens, 12)
    assert 6 < sum(len(chunk.choices) for chunk in chunks) <= 12
    assert {chunk.model for chunk in chunks} == {expert}


@pytest.mark.parametrize("expert", EXPERTS)
def test_an_openai_client_chats(client: openai.OpenAI, expert: str) -> None:
    def messages() -> list[Any]:
        return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPTS[expert]}]

    more = {"ignore_eos": True}
    raw = client.chat.completions.with_raw_response.create(
        model="expert-router", messages=messages(), max_tokens=12, extra_body=more
    )
    assert raw.headers["x-expert-router-class"] == expert
    whole = raw.parse()
    assert (whole.model, whole.choices[0].finish_reason) == (expert, "length")
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    chunks = list(
        client.chat.completions.create(
            model="expert-router",
            messages=messages(),
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=more,
        )
    )
    assert chunks[-1].usage == whole.usage
    assert any(choice.delta.content for chunk in chunks for choice in chunk.choices)


def test_an_openai_client_is_told_what_there_is_and_what_is_wrong(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [*EXPERTS, "expert-router", "laptop"]
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-9' does not exist"):
        client.completions.create(model="gpt-9", prompt="x")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="2048"):  # the engine's own words
            client.completions.create(model="expert-router", prompt="function " * 2500, stream=stream)


def test_the_documented_client_works_as_it_stands(fleet: ServedFleet) -> None:
    code = documented("```python").replace("8080", str(fleet.port))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=STREAM_S, check=False)
    assert found.returncode == 0, found.stderr
    expert, tokens = found.stdout.split()
    assert expert in EXPERTS
    assert 1 <= int(tokens) <= 40


def test_sixteen_users_are_measured(fleet: ServedFleet, tmp_path: Path) -> None:
    known = len(fleet.request_log())
    before = {name: fleet.of_engine(name, "request_success_total", finished_reason="length") for name in EXPERTS}
    told = user(
        *("run", LAPTOP, "--url", fleet.url, "--logs", str(fleet.logs), "--out", str(tmp_path)),
        *("--users", "16", "--duration", "40"),
    )
    print(told)
    fleet.wait(fleet.is_quiet, 30, "the users' last requests to be gone")
    lines = pd.DataFrame(fleet.request_log()[known:])
    lines["request_id"] = lines["request_id"].str.rpartition("-")[2].astype(int)
    requests = pd.read_parquet(tmp_path / "requests.parquet")
    with (tmp_path / "summary.csv").open(encoding="utf-8") as stream:
        rows = {row["expert"]: row for row in csv.DictReader(stream)}
    assert list(rows) == ["all", *EXPERTS]

    # Every request sent is in the record once, and the gateway and the engines say the same of it.
    for column in ("expert", "routed_class", "status"):
        requests[column] = requests[column].astype(str)
    joined = requests.merge(lines, on="request_id", how="outer", suffixes=("", "_gateway"), validate="1:1")
    assert len(joined) == len(requests) == len(lines) > 32
    assert (joined["expert"] == joined["expert_gateway"])[joined["status"] == "completed"].all()
    assert (joined["routed_class"] == joined["class_name"])[joined["status"] == "completed"].all()
    assert set(joined["outcome"][joined["status"] == "completed"]) == {"completed"}
    assert set(joined["outcome"][joined["status"] == "in_flight"]) <= {"cancelled", "completed"}
    whole = rows["all"]
    assert int(whole["failed"]) == 0
    assert int(whole["sent"]) == len(requests)
    assert int(whole["completed"]) == (requests["status"] == "completed").sum()
    assert 0 < int(whole["in_flight"]) <= 16
    for name in EXPERTS:
        done = int(rows[name]["completed"])
        by_engine = fleet.of_engine(name, "request_success_total", finished_reason="length") - before[name]
        assert done <= by_engine <= done + int(whole["in_flight"])

    # The figures are those of the records from second 10, when the file's warm-up ends, to 40.
    measured = requests[(requests["status"] == "completed") & (requests["last_token_s"] > 10)]
    for name, row in rows.items():
        part = measured if name == "all" else measured[measured["expert"] == name]
        assert int(row["measured"]) == len(part) > 3
        assert float(row["output_throughput"]) == pytest.approx(part["output_tokens"].sum() / 30, rel=0.02)
        ttft_s = part["first_token_s"] - part["sent_s"]
        e2el_s = part["last_token_s"] - part["sent_s"]
        several = part[part["output_tokens"] > 1]
        tpot_s = (several["last_token_s"] - several["first_token_s"]) / (several["output_tokens"] - 1)
        for metric, values_s in (("ttft", ttft_s), ("e2el", e2el_s), ("tpot", tpot_s)):
            assert float(row[f"mean_{metric}_ms"]) == pytest.approx(values_s.mean() * 1e3, rel=1e-6)
            assert float(row[f"p99_{metric}_ms"]) == pytest.approx(values_s.quantile(0.99) * 1e3, rel=1e-6)
    # And so do the engines say, asked every two seconds for what they hold.
    inside_s = requests["last_token_s"].fillna(40).clip(10, 40) - requests["sent_s"].clip(10, 40)
    held = float(whole["running"]) + float(whole["waiting"])
    print(f"under way by the users' records {inside_s.sum() / 30:.2f}, by the engines' gauges {held:.2f} on average")
    assert held == pytest.approx(inside_s.sum() / 30, rel=0.2)
    assert all(0.2 < float(rows[name]["utilization"]) <= 1 for name in EXPERTS)

    # What is printed is what is written, and the pictures are there.
    shown = {words[0 if words[0] != "laptop" else 1]: words for words in map(str.split, told.splitlines()) if words}
    for first, row in (("16", whole), *((name, rows[name]) for name in EXPERTS)):
        for metric in ("output_throughput", "p99_ttft_ms", "median_tpot_ms"):
            assert number_text(float(row[metric])) in shown[first], (metric, shown[first])
    pictures = {
        path.name for path in tmp_path.iterdir() if path.suffix in (".png", ".svg") and path.stat().st_size > 5000
    }
    assert len(pictures) == 6, pictures


def test_vllms_own_load_generator_is_served(fleet: ServedFleet, tmp_path: Path) -> None:
    known = len(fleet.request_log())
    command = documented("vllm bench serve").replace("vllm bench serve", documented("python -c").strip())
    command = command.replace("8080", str(fleet.port))
    command = re.sub(r"~/\S+/", f"{default_folder('laptop-37m', 'bf16').parent}/", command)
    words = [sys.executable, *shlex.split(command)[1:]]
    with (tmp_path / "bench.log").open("w") as log:
        found = subprocess.run(words, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, timeout=STREAM_S, check=False)
    assert found.returncode == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (result["completed"], result["failed"]) == (32, 0)
    assert result["output_lens"] == [20] * 32
    assert result["total_output_tokens"] == 640
    figures = {name: value for name, value in result.items() if name.endswith(("_ms", "_throughput"))}
    assert len(figures) >= 14
    assert all(math.isfinite(value) and value >= 0 for value in figures.values()), figures
    assert all(figures[name] > 0 for name in ("output_throughput", "mean_ttft_ms", "p99_tpot_ms", "mean_itl_ms")), (
        figures
    )
    lines = fleet.request_log()[known:]
    assert [line["outcome"] for line in lines] == ["completed"] * 32

    ((run, requests),) = read_bench_results(tmp_path / "bench.json", run_of_settings(["gpu=CPU"]))
    assert (run.n_requests, run.n_success, run.load_type, run.concurrency_limit) == (32, 32, "closed_loop", 8)
    assert run.output_tokens_mean == 20
    assert run.ttft_mean_s == pytest.approx(result["mean_ttft_ms"] / 1e3)
    assert run.tpot_mean_s == pytest.approx(result["mean_tpot_ms"] / 1e3)
    assert run.itl_p99_s == pytest.approx(result["p99_itl_ms"] / 1e3)
    assert run.output_tokens_per_s == pytest.approx(result["output_throughput"])
    assert requests.completed.all()


# ----------------------------------------------------------------------------------------------- what may happen


def test_clients_that_leave_take_their_requests_from_the_engines(fleet: ServedFleet) -> None:
    left = fleet.of_gateway("client_disconnects_total")
    begun_s, left_s, clear_s = 0.0, 0.0, 0.0

    async def story(client: Client) -> None:
        nonlocal begun_s, left_s, clear_s
        begun_s = time.monotonic()
        streams = [answer(client, PROMPTS[name], 1900) for name in EXPERTS for _ in range(4)]
        await under_way(client, 8, chunks=5)
        running = [await asyncio.to_thread(fleet.of_engine, name, "num_requests_running") for name in EXPERTS]
        assert running == [4, 4]
        assert await asyncio.to_thread(fleet.of_gateway, "inflight") == 8
        for connection in list(client.open):
            connection.leave()
        left_s = time.monotonic()
        await asyncio.gather(*streams)
        await until(fleet.is_quiet, 60, what="the engines' running counts and the gateway's gauges to be 0")
        clear_s = time.monotonic()

    replies, lines = tell(fleet, story)
    assert check_ledger(replies, lines) == {"cancelled": 8}
    assert {line["outcome"] for line in lines} == {"cancelled"}
    assert fleet.of_gateway("client_disconnects_total") - left == 8
    chunks = max(len(reply.times_s) for reply in replies)
    would_take_s = (left_s - begun_s) * (1900 - chunks) / chunks
    print(f"engines clear {clear_s - left_s:.2f} s after 8 clients left their answers of {would_take_s:.0f} s more")
    assert clear_s - left_s < would_take_s / 4


def test_a_gateway_worker_killed_under_load_costs_its_own_requests_only(fleet: ServedFleet) -> None:
    victim, other = fleet.workers()
    received = fleet.of_gateway("requests_received_total")
    back_s = 0.0

    def is_back() -> bool:
        now = fleet.workers()
        ready = all(fleet.of_gateway("replica_up", expert=name) == 2 for name in EXPERTS)
        return len(now) == 2 and other in now and victim not in now and ready

    async def load(client: Client) -> None:
        nonlocal back_s
        streams = [answer(client, PROMPTS[EXPERTS[place % 2]], 60) for place in range(24)]
        await under_way(client, 24)
        os.kill(victim, signal.SIGKILL)
        back_s = await until(is_back, 60, what="the worker to be back and to see both experts")
        await asyncio.gather(*streams)

    replies, lines = tell(fleet, load)
    outcomes = check_ledger(replies, lines, worker_killed=True)
    print(f"24 streams over two workers, one killed: {dict(outcomes)}; the worker is back after {back_s:.1f} s")
    assert set(outcomes) == {"completed", "failed: cut"}
    assert all(usage_of(reply)["completion_tokens"] == 60 for reply in replies if reply.outcome == "completed")
    assert fleet.of_gateway("requests_received_total") - received == 24
    assert "ended with status -9; starting it again" in (fleet.logs / "gateway.log").read_text()

    async def again(client: Client) -> None:
        await asyncio.gather(*(answer(client, PROMPTS[EXPERTS[place % 2]], 5) for place in range(24)))

    assert check_ledger(*tell(fleet, again)) == {"completed": 24}


def test_an_expert_killed_under_load_harms_nobody_elses_and_comes_back(fleet: ServedFleet) -> None:
    group = fleet.replica("chat")["pid"]
    finished = fleet.of_engine("code", "request_success_total", finished_reason="length")
    killed_s = back_s = 0.0
    streams: list[Reply] = []
    asked: dict[str, list[Reply]] = {name: [] for name in EXPERTS}

    async def story(client: Client) -> None:
        nonlocal killed_s, back_s
        tasks = [answer(client, PROMPTS[name], 120) for name in EXPERTS for _ in range(8)]
        await under_way(client, 16)
        os.kill(child_named(group, "api_server"), signal.SIGKILL)
        killed_s = time.monotonic()
        enough = asyncio.Event()
        users = [
            asyncio.create_task(keep_asking(client, name, asked[name], enough)) for name in EXPERTS for _ in range(2)
        ]
        streams.extend(await asyncio.gather(*tasks))
        await until(lambda: fleet.replica("chat")["restarts"] == 1, 60, what="the supervisor to start the expert again")
        await until(
            lambda: any(reply.outcome == "completed" for reply in asked["chat"]),
            START_S,
            what="an answer of the expert that was killed",
        )
        back_s = time.monotonic()
        enough.set()
        await asyncio.gather(*users)

    replies, lines = tell(fleet, story)
    outcomes = check_ledger(replies, lines)
    by_expert = {name: [reply for reply in streams if expert_of(reply) == name] for name in EXPERTS}
    assert [len(by_expert[name]) for name in EXPERTS] == [8, 8]
    for reply in by_expert["code"]:
        assert reply.outcome == "completed"
        assert usage_of(reply)["completion_tokens"] == 120
    for reply in by_expert["chat"]:
        assert (reply.outcome, reply.errors, reply.end) == ("failed: error event", 1, "clean")
        assert reply.body.count(b"data: [DONE]") == 1
        assert reply.is_done
    told_s = [reply.ended_s - killed_s for reply in by_expert["chat"]]
    refused = [reply for reply in asked["chat"] if reply.status == 503]
    print(f"error events at most {max(told_s):.2f} s after the kill, its class served after {back_s - killed_s:.0f} s")
    print(f"{len(replies)} requests: {dict(outcomes)}")
    assert max(told_s) < 5
    assert set(outcomes) <= {"completed", "failed: error event", "failed: 503", "failed: 502"}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert refused
    assert len(asked["code"]) > 5
    assert {reply.outcome for reply in asked["code"]} == {"completed"}
    by_engine = fleet.of_engine("code", "request_success_total", finished_reason="length") - finished
    assert by_engine == 8 + len(asked["code"])

    async def after(client: Client) -> None:
        await asyncio.gather(*(answer(client, PROMPTS["chat"], 5) for _ in range(8)))

    assert check_ledger(*tell(fleet, after)) == {"completed": 8}
    state = fleet.replica("chat")
    assert (state["state"], state["restarts"]) == ("ready", 1)
    assert "killed (signal 9)" in state["reason"]


async def keep_asking(client: Client, expert: str, replies: list[Reply], enough: asyncio.Event) -> None:
    """Be a user of one class, who thinks between answers and takes refusals with patience."""
    while not enough.is_set():
        replies.append(await answer(client, PROMPTS[expert], 8))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(enough.wait(), 0.5)


def test_told_to_stop_it_finishes_what_is_under_way_and_leaves_nothing(fleet: ServedFleet) -> None:
    processes, ports = fleet.processes(), range(fleet.port, fleet.port + 4)
    shared = {
        name
        for pid in processes
        for name in re.findall(r"/dev/shm/\w+", Path(f"/proc/{pid}/maps").read_text())
        if not name.startswith("/dev/shm/sem")
    }
    folders = list(fleet.temporary.iterdir())
    assert len(folders) == 3, "one of the gateway and of each expert, and none of the expert that was killed"
    assert any(path.is_socket() for path in fleet.temporary.rglob("*"))
    assert shared

    async def story(client: Client) -> None:
        streams = [answer(client, PROMPTS[name], 60) for name in EXPERTS]
        await under_way(client, 2)
        fleet.process.send_signal(signal.SIGTERM)
        replies = await asyncio.gather(*streams)
        assert [reply.outcome for reply in replies] == ["completed"] * 2

    play(fleet.port, story)
    began_s = time.monotonic()
    assert fleet.process.wait(90) == 0
    print(f"{len(processes)} processes ended {time.monotonic() - began_s:.1f} s after the last answer")
    assert becomes_true(lambda: not any(map(is_alive, processes)), 10)
    assert not list(fleet.temporary.iterdir())
    assert not [name for name in shared if Path(name).exists()]
    assert not (fleet.logs / STATE_FILE).exists()
    assert all(becomes_true(lambda port=port: port_is_free(port), 5) for port in ports)  # type: ignore[misc]
