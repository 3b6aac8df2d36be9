import json

from sim.chrome_trace import TracedIteration, chrome_trace


def test_iterations_become_slices_and_counters_in_microseconds() -> None:
    iterations = [
        TracedIteration(0.0, 0.02, prefill_tokens=512, decodes=0, kv_usage=0.1, waiting=2, prefills=1),
        TracedIteration(0.02, 0.01, prefill_tokens=0, decodes=3, kv_usage=0.2, waiting=0, prefills=0),
        TracedIteration(1.0, 0.01, prefill_tokens=64, decodes=1, kv_usage=0.1, waiting=0, prefills=1),
    ]
    events = json.loads(chrome_trace(iterations, "expert-0, replica 0"))["traceEvents"]
    slices = [(event["name"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    assert slices == [("prefill", 0, 20_000), ("decode", 20_000, 10_000), ("mixed", 1_000_000, 10_000)]
    batch = [(event["ts"], event["args"]["decodes"]) for event in events if event["name"] == "batch"]
    assert batch == [(0, 0), (20_000, 3), (30_000, 0), (1_000_000, 1), (1_010_000, 0)]
    assert [event["args"] for event in events if event["name"] == "kv usage"] == [{"%": 10}, {"%": 20}, {"%": 10}]
    assert events[0]["args"] == {"name": "expert-0, replica 0"}


def test_no_iterations_make_a_trace_with_names_only() -> None:
    assert {event["ph"] for event in json.loads(chrome_trace([], "idle"))["traceEvents"]} == {"M"}
