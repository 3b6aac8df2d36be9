"""``run`` sends what ``simulate`` sends, and reports what a real server did in the words that ``simulate`` uses."""

import asyncio
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import real.users.load_run
from real.users.engine_metrics import EngineMetrics, ReplicaUrl, parse_metrics
from real.users.exchange import Exchange
from real.users.run import run
from sim.cli import main
from sim.fleet_file import LoadedFleetFile, parse_fleet
from sim.outputs import result_json, write_result
from sim.report import report
from sim.result import Result
from sim.run import simulate
from sim.spec import OutageSpec
from sim.users import PAUSE_AFTER_FAILURE_S
from tests.real_fleet import ROOT, cli, fleet_file, fleet_text, token_server, write_checkpoint, write_corpus

CLOSED = "{kind: closed_loop, users: 4, think_time_s: {distribution: exponential, mean: 0.02}}"
OPEN = "{kind: open_loop, rate_rps: 40, burstiness: 0.5}"
TTFT_S, ITL_S = 0.05, 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("real")
    write_checkpoint(made / "checkpoint")
    write_corpus(made / "prompts.jsonl")
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with token_server(ttft_s=TTFT_S, itl_s=ITL_S, tokenizer=str(folder / "checkpoint" / "tokenizer.json")) as url:
        yield url


@pytest.fixture(scope="module")
def measured(folder: Path, server: str) -> Result:
    file = fleet_file(folder / "checkpoint", CLOSED)
    return run(file, url=server, corpus=folder / "prompts.jsonl")


def sent_to(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{url}/requests") as answer:
        found: list[dict[str, Any]] = json.loads(answer.read())
    return found


def of_users(requests: pd.DataFrame, count: int) -> pd.DataFrame:
    """The first ``count`` requests of each user, in order."""
    ordered = requests.sort_values(["user_id", "request_id"])
    columns = ["user_id", "class", "prompt_tokens", "output_tokens"]
    return ordered.groupby("user_id").head(count)[columns].reset_index(drop=True).astype({"class": str})


# --------------------------------------------------------------------------------------------------- the same traffic


def test_users_send_the_requests_that_simulated_users_send(folder: Path, measured: Result) -> None:
    simulated = simulate(fleet_file(folder / "checkpoint", CLOSED)).requests
    pd.testing.assert_frame_equal(of_users(measured.requests, 6), of_users(simulated, 6))


def test_users_think_as_long_as_simulated_users(folder: Path, measured: Result) -> None:
    def thoughts(requests: pd.DataFrame) -> np.ndarray[Any, Any]:
        of_user = requests[requests["user_id"] == 0].sort_values("sent_s")
        return np.asarray(of_user["sent_s"].to_numpy()[1:6] - of_user["last_token_s"].to_numpy()[:5])

    really, simulated = (
        thoughts(measured.requests),
        thoughts(simulate(fleet_file(folder / "checkpoint", CLOSED)).requests),
    )
    assert (really >= simulated - 0.002).all()
    assert np.median(really - simulated) < 0.02


def test_open_arrivals_come_when_simulated_ones_come(folder: Path, server: str) -> None:
    file = fleet_file(folder / "checkpoint", OPEN)
    really = run(file, url=server, corpus=folder / "prompts.jsonl").requests.set_index("request_id").sort_index()
    simulated = simulate(file).requests.set_index("request_id").sort_index()
    both = really.index.intersection(simulated.index)
    assert len(both) >= 33
    for name in ("class_index", "prompt_tokens", "output_tokens"):
        assert (really.loc[both, name] == simulated.loc[both, name]).all()
    late_s = (really.loc[both, "sent_s"] - simulated.loc[both, "sent_s"]).to_numpy()
    assert late_s.min() >= -0.002  # timers count whole milliseconds
    assert np.median(late_s) < 0.02


def test_a_trace_is_replayed_whole(folder: Path, server: str) -> None:
    trace = folder / "trace.jsonl"
    rows = [{"timestamp": 40 * n, "input_length": 20 + n, "output_length": 2 + n % 3} for n in range(20)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = fleet_file(
        folder / "checkpoint", f"{{kind: trace, file: {trace}, format: mooncake}}", run="{replications: 1}"
    )
    requests = run(file, url=server, corpus=folder / "prompts.jsonl").requests.sort_values("request_id")
    assert requests["status"].eq("completed").all()
    assert requests["prompt_tokens"].tolist() == [row["input_length"] for row in rows]
    assert requests["output_tokens"].tolist() == [row["output_length"] for row in rows]


def test_run_works_inside_an_event_loop_as_in_a_notebook(folder: Path, server: str) -> None:
    async def cell() -> Result:
        file = fleet_file(folder / "checkpoint", "{kind: closed_loop, users: 2}", run="{requests: 5, replications: 1}")
        return run(file, url=server, corpus=folder / "prompts.jsonl")

    assert asyncio.run(cell()).summary_rows[0]["measured"] == 5


# ------------------------------------------------------------------------------------------------ what was measured


def test_figures_are_what_the_server_did(measured: Result) -> None:
    (total, _) = measured.summary_rows
    assert total["measured"] == 30
    assert total["median_ttft_ms"] >= TTFT_S * 1e3
    assert total["median_ttft_ms"] < TTFT_S * 1e3 + 60
    assert total["mean_tpot_ms"] == pytest.approx(ITL_S * 1e3, rel=0.3)
    assert total["mean_itl_ms"] == pytest.approx(total["mean_tpot_ms"], rel=0.3)


def test_prompt_lengths_are_exact_by_the_servers_count(measured: Result) -> None:
    assert not [note for note in measured.notes if "another length" in note]


def test_every_request_has_one_outcome_and_its_id_on_both_sides(measured: Result, server: str) -> None:
    (record,) = measured.runs
    counts = measured.requests["status"].value_counts()
    assert (
        record.checks["conservation"] == f"{counts['completed']} completed, 0 failed, {counts['in_flight']} in_flight"
    )
    bodies = sent_to(server)
    prefixes = [each["x-request-id"].rpartition("-")[0] for each in bodies]
    ours = [each["x-request-id"] for each, prefix in zip(bodies, prefixes, strict=True) if prefix == prefixes[0]]
    assert f"as {prefixes[0]}-NUMBER" in record.checks["ledger"]
    assert sorted(int(each.rpartition("-")[2]) for each in ours) == sorted(measured.requests["request_id"])
    assert len(set(ours)) == len(ours)


def test_what_was_left_in_flight_is_cancelled(measured: Result, server: str) -> None:
    assert measured.requests["status"].eq("in_flight").sum() > 0
    deadline_s = time.monotonic() + 5
    while _running(server) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert _running(server) == 0


def _running(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        return parse_metrics(answer.read().decode())["running"]


def test_frames_have_the_columns_of_a_simulated_result(folder: Path, measured: Result) -> None:
    simulated = simulate(fleet_file(folder / "checkpoint", CLOSED))
    assert measured.requests.dtypes.astype(str).to_dict() == simulated.requests.dtypes.astype(str).to_dict()
    assert list(measured.summary.columns) == list(simulated.summary.columns)
    assert list(measured.replications.columns) == list(simulated.replications.columns)


def test_what_a_user_cannot_see_is_unknown_and_not_zero(measured: Result) -> None:
    requests, (total, _) = measured.requests, measured.summary_rows
    for name in ("router_start_s", "front_end_start_s", "engine_arrival_s", "scheduled_s", "last_token_engine_s"):
        assert requests[name].isna().all()
    assert (requests[["preemptions", "cached_prompt_tokens"]] == -1).all(axis=None)
    for name in ("front_end_utilization", "mean_engine_queue_ms", "router_utilization", "misrouted_share"):
        assert np.isnan(total[name])


def test_engines_are_asked_for_their_figures(measured: Result) -> None:
    (replica,) = measured.runs[0].replicas
    assert replica.kv_usage == 0.25
    assert replica.preemptions == 0
    assert 0 <= replica.running <= 4


def test_a_result_says_that_it_was_measured_and_where(measured: Result, server: str, tmp_path: Path) -> None:
    assert measured.measured is not None
    assert measured.curve_labels == ["measured, vLLM 0.0.mock"]
    written = {path.name: path for path in write_result(measured, tmp_path, ("csv", "parquet", "svg", "vllm"))}
    assert (
        f"# Measured, from {measured.measured.started} on, at {server}." in written["fleet.resolved.yaml"].read_text()
    )
    told = json.loads(result_json(measured))
    assert told["measured"]["engines"] == {"alone": {"one": "vLLM 0.0.mock"}}
    assert "event loop late by" in told["measured"]["runs"][0]["checks"]["load client"]
    assert told["fleets"]["alone"]["one"]["measured_on"] == "vLLM 0.0.mock"
    detailed = json.loads(written["alone-concurrency4-r0.json"].read_text())
    assert (detailed["backend"], detailed["simulated"], detailed["url"]) == ("expert-router run", False, server)
    text = "\n".join(str(getattr(part, "renderable", part)) for part in report(measured, 120))
    assert f"alone at {server}" in text
    assert "roofline" not in text


# ---------------------------------------------------------------------------------------------------- behind a router


def test_the_gateway_tells_where_a_request_went_and_when(folder: Path) -> None:
    file = fleet_file(folder / "checkpoint", CLOSED, router="{policy: class}")
    with token_server(ttft_s=0.02, itl_s=0.002, model="alone", routed=True) as url:
        result = run(file, url=url, corpus=folder / "prompts.jsonl", replica_urls={"one": [url]})
    answered = result.requests[result.requests["status"] == "completed"]
    assert set(answered["routed_class"]) == {"chat"}
    assert set(answered["expert"]) == {"one"}
    assert (answered["replica_index"] == 0).all()
    assert (answered["sent_s"] <= answered["router_start_s"] + 1e-6).all()
    assert (answered["router_end_s"] <= answered["first_token_s"]).all()
    (total, _) = result.summary_rows
    assert 0 < total["misrouted_share"] < 1
    assert 0 <= total["mean_router_wait_ms"] < 100
    (record,) = result.runs
    assert record.router is not None
    assert record.router.requests >= 0


def test_a_gateway_on_another_clock_is_left_out(folder: Path) -> None:
    file = fleet_file(folder / "checkpoint", CLOSED, router="{policy: class}")
    headers = {"x-expert-router-received-s": "1.0", "x-expert-router-chosen-s": "1.1"}
    with token_server(ttft_s=0.02, itl_s=0.002, routed=True, headers=headers) as url:
        result = run(file, url=url, corpus=folder / "prompts.jsonl")
    assert result.requests["router_start_s"].isna().all()
    assert any("another clock" in note for note in result.notes)


def test_a_server_that_is_no_gateway_leaves_the_choice_unknown(folder: Path, server: str) -> None:
    text = fleet_text(folder / "checkpoint", CLOSED, router="{policy: class}")
    expert = f"{{model: laptop-16m, gpu: CPU, checkpoint: {folder / 'checkpoint'}}}"
    text = text.replace(f"one: {expert}", f"code: {expert}\n      chat: {expert}")
    result = run(parse_fleet(text), url=server, corpus=folder / "prompts.jsonl")
    total, *experts = result.summary_rows
    assert total["measured"] == 30
    assert [row["measured"] for row in experts] == [0, 0]
    assert np.isnan(total["misrouted_share"])
    assert any("which expert gave it" in note for note in result.notes)


def test_replicas_of_a_fleet_that_serves_are_found_by_its_state_file(folder: Path, server: str, tmp_path: Path) -> None:
    state = {"url": server, "fleet": "alone", "supervisor_pid": os.getpid()}
    state |= {"replicas": [{"expert": "one", "replica": 0, "url": server}]}
    (tmp_path / "fleet.json").write_text(json.dumps(state))
    file = fleet_file(folder / "checkpoint", CLOSED, router="{policy: class}")
    result = run(file, url=server, corpus=folder / "prompts.jsonl", logs=tmp_path)
    assert result.runs[0].replicas[0].kv_usage == 0.25


# ----------------------------------------------------------------------------------------------------- what goes wrong


def test_a_fleet_that_answers_nothing_well_is_given_up(folder: Path) -> None:
    with token_server(model="one", refuse=404) as url:
        result = run(fleet_file(folder / "checkpoint", CLOSED), url=url, corpus=folder / "prompts.jsonl")
    (record,) = result.runs
    assert 20 <= (record.requests["status"] == 1).sum() <= 24
    assert any(note.startswith("stopped after") and "not one completed" in note for note in record.notes)
    assert any(note.startswith("requests failed:") and "HTTP 404: 'no'" in note for note in record.notes)


def test_a_user_whose_request_failed_waits_as_long_as_the_server_asks() -> None:
    exchange = Exchange(lambda ended: None)
    assert real.users.load_run._pause_s(exchange) == 0
    exchange.failure = "HTTP 429"
    assert real.users.load_run._pause_s(exchange) == PAUSE_AFTER_FAILURE_S
    exchange.headers["retry-after"] = "3"
    assert real.users.load_run._pause_s(exchange) == 3


def with_outage(file: LoadedFleetFile) -> LoadedFleetFile:
    outage = OutageSpec(expert="one", at_s=0.3, for_s=5.0)
    fleets = {name: fleet.model_copy(update={"outages": [outage]}) for name, fleet in file.fleets.items()}
    return file.model_copy(update={"fleets": fleets})


def test_outages_are_made_when_it_is_time(folder: Path) -> None:
    file = with_outage(fleet_file(folder / "checkpoint", CLOSED, run="{duration_s: 1}", router="{policy: class}"))
    killed: list[tuple[Any, ...]] = []
    began_s = time.monotonic()
    with token_server(model="alone", routed=True) as url:
        result = run(
            file,
            url=url,
            corpus=folder / "prompts.jsonl",
            replications=1,
            kill=lambda *which: killed.append((*which, time.monotonic())),
        )
    ((expert, replica, for_s, killed_s),) = killed
    assert (expert, replica, for_s) == ("one", 0, 5.0)
    assert killed_s >= result.runs[0].began_monotonic_s + 0.299 > began_s


def test_outages_of_a_fleet_that_runs_elsewhere_are_refused(folder: Path, server: str) -> None:
    file = with_outage(fleet_file(folder / "checkpoint", CLOSED, router="{policy: class}"))
    with pytest.raises(ValueError, match="outages can be made only in a fleet that is started here; leave --url out"):
        run(file, url=server, corpus=folder / "prompts.jsonl")


def test_interrupting_keeps_what_was_measured(folder: Path, server: str, tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(fleet_text(folder / "checkpoint", CLOSED))
    arguments = ["run", str(fleet), "--url", server, "--prompts", str(folder / "prompts.jsonl"), "--duration", "300"]
    command = cli([*arguments, "--json", "--out", str(tmp_path / "out"), "--format", "csv"])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    before = len(sent_to(server))
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while len(sent_to(server)) < before + 20:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        told, messages = process.communicate(timeout=60)
    assert process.returncode == 130, messages
    found = json.loads(told)
    assert found["interrupted"]
    assert found["summary"][0]["completed"] >= 10
    assert found["summary"][0]["measured"] > 0
    assert any("interrupted after" in note for note in found["notes"])
    assert (tmp_path / "out" / "summary.csv").is_file()


def test_a_client_that_does_not_keep_up_is_in_the_notes(
    folder: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = real.users.load_run.LoadRun._on_end

    def slow(self: Any, exchange: Exchange) -> None:
        time.sleep(0.03)
        honest(self, exchange)

    monkeypatch.setattr(real.users.load_run.LoadRun, "_on_end", slow)
    result = run(fleet_file(folder / "checkpoint", CLOSED), url=server, corpus=folder / "prompts.jsonl")
    assert any("the load client did not keep up" in note for note in result.notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://127.0.0.1:1"], "no OpenAI-compatible server answers there"),
        (["--url", "localhost"], "expected a URL such as"),
        (["--url", "http://127.0.0.1:1", "--fleet", "alon"], "did you mean 'alone'?"),
        (["--url", "http://127.0.0.1:1", "--replica-url", "two=http://x"], "no such expert"),
        (["--url", "http://127.0.0.1:1", "--replica-url", "two"], "expected EXPERT=URL"),
        (["--replica-url", "one=http://x"], "needs --url"),
        (["--users", "0"], "must be >= 1"),
        (["--duration", "0"], "0"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(fleet_text(folder / "checkpoint", CLOSED))
    prompts = ["--prompts", str(folder / "prompts.jsonl")]
    outcome = CliRunner().invoke(main, ["run", str(fleet), *prompts, *arguments])
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.output.split())


# -------------------------------------------------------------------------------------------------------- the engines


def test_figures_of_a_prometheus_page_are_summed_over_engines() -> None:
    text = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7e9
python_gc_objects_collected_total{generation="0"} 5.0
"""
    assert parse_metrics(text) == {"running": 7.0, "preemptions": 2.0}


def test_a_replica_that_nobody_could_ask_is_unknown() -> None:
    stats = EngineMetrics([ReplicaUrl(0, 0, "http://127.0.0.1:1")]).stats(0, 0)
    assert np.isnan([stats.utilization, stats.running, stats.kv_usage_max, stats.preemptions, stats.iterations]).all()
