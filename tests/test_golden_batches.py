"""The engine reproduces the real vLLM scheduler, iteration by iteration, on batches recorded from it."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sim.engine import Engine, EngineRequest
from sim.fleet import EngineSettings
from sim.kv_cache import PrefixGroup

FILES = sorted((Path(__file__).parent / "data").glob("golden_*.json.gz"))


def load(path: Path) -> dict[str, Any]:
    with gzip.open(path, "rt") as file:
        return dict(json.load(file))


def simulated_iterations(recording: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the engine on a recording's requests, all queued at time 0, and log it the way the recording is."""
    settings = recording["settings"]
    engine: Engine[EngineRequest] = Engine(
        EngineSettings(
            max_num_seqs=settings["max_num_seqs"],
            max_num_batched_tokens=settings["max_num_batched_tokens"],
            max_model_len=settings["max_model_len"],
            block_size=settings["block_size"],
            num_kv_blocks=settings["num_kv_blocks"] - 1,  # one is the engine's null block
            enable_prefix_caching=settings["prefix_caching"],
            scheduler_reserve_full_isl=True,
            async_scheduling=settings["async_scheduling"],
        )
    )
    group = PrefixGroup(settings["shared_prefix_tokens"], settings["block_size"])
    requests = [EngineRequest(r["prompt_tokens"], r["output_tokens"], group) for r in recording["requests"]]
    number = {request: i for i, request in enumerate(requests)}
    for request in requests:
        engine.add(request)
    log = []
    seen: set[EngineRequest] = set()
    while (batch := engine.schedule()) is not None:
        scheduled = [[number[r], 1] for r in engine.decoding(batch.iteration)]
        scheduled += [[number[r], tokens] for r, tokens in batch.chunks]
        assert len(scheduled) == batch.decodes + len(batch.chunks)
        log.append(
            {
                "scheduled": sorted(scheduled),
                "new": sorted(number[r] for r in batch.admitted if r not in seen),
                "preempted": sorted(number[r] for r in batch.preempted),
                "kv_usage": engine.kv_usage,
            }
        )
        seen.update(batch.admitted)
        engine.finish_run(1)
    assert engine.kv.free == engine.kv.num_blocks
    return log


def test_the_recordings_are_there() -> None:
    assert [path.name for path in FILES] == [f"golden_{letter}.json.gz" for letter in "abcij"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_iteration_is_the_real_schedulers(path: Path) -> None:
    recording = load(path)
    simulated = simulated_iterations(recording)
    for number, (ours, real) in enumerate(zip(simulated, recording["iterations"], strict=True)):
        assert ours["scheduled"] == sorted(real["scheduled"]), f"iteration {number}"
        assert ours["new"] == sorted(real["new"]), f"iteration {number}"
        assert ours["preempted"] == sorted(real["preempted"]), f"iteration {number}"
        assert ours["kv_usage"] == pytest.approx(real["kv_usage"], abs=1e-6), f"iteration {number}"
