"""The same replicas die in a simulated and in a real fleet, and the same requests fail in the same ways."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.outage_truth import FILE, FLEET, fates
from sim.engine import Engine, EngineRequest
from sim.fleet_file import load_fleet
from sim.resolve import resolve_fleet
from tests.kit.client import Client, play
from tests.kit.engine_expert import read_log
from tests.kit.engine_fleet import EngineExpert
from tests.kit.process_tree import becomes_true
from tests.kit.processes import running

BUSY_S = 0.05  # a CI machine is late by more than the command's 10 ms


def test_as_many_requests_fail_in_each_way_as_predicted(tmp_path: Path) -> None:
    found = fates(tmp_path, near_s=BUSY_S)
    assert found.simulated["sent"] == pytest.approx(found.measured["sent"], abs=2)
    assert found.agree, found
    assert found.measured["answer broke off"] > 5
    assert found.measured["HTTP 503"] > 5


def test_the_known_engine_takes_exactly_the_times_of_its_curve(tmp_path: Path) -> None:
    expert = EngineExpert(FILE, "code", log=tmp_path / "log")
    with running(expert):
        expert.wait_until_ready()

        async def one(client: Client) -> None:
            assert (await client.complete("count these few words", max_tokens=7)).outcome == "completed"

        play(expert.port, one)
        assert becomes_true(lambda: bool(read_log(tmp_path / "log")), within_s=10)  # noted after the last token is sent
        ((arrived_s, scheduled_s, first_s, last_s),) = read_log(tmp_path / "log").values()
    assert scheduled_s == arrived_s
    resolved = resolve_fleet(load_fleet(FILE), FLEET).experts[1]
    for prompt_tokens in range(4, 9):  # as the tokenizer may count them
        engine: Engine[EngineRequest] = Engine(resolved.engine)
        engine.add(EngineRequest(prompt_tokens, 7))
        took_s = []
        while (batch := engine.schedule()) is not None:
            took_s.append(resolved.curve.iteration_s(engine.work(batch)))
            engine.finish_run(1)
        if np.isclose(first_s - scheduled_s, took_s[0], rtol=0, atol=1e-7):
            assert last_s - first_s == pytest.approx(sum(took_s[1:]), abs=1e-7)
            return
    pytest.fail(f"{first_s - scheduled_s} s is no prompt's time")
