import numpy as np
import pytest

from calibrate.fit.observations import observe
from calibrate.tables.lengths import CHAT_LENGTHS, saturated_lengths
from calibrate.tables.run_engine import run_engine
from calibrate.validate.replay_load import replay_load
from sim.streams import stream
from tests.fleets import AffineCurve
from tests.measured_tables import run_of

SATURATED = run_of(
    arch="dense",
    load_type="saturated_closed_loop",
    max_num_seqs=64,
    concurrency_mean=64.0,
    prompt_tokens_mean=float("nan"),
    prompt_tokens_std=float("nan"),
    output_tokens_mean=400.0,
    output_tokens_std=float("nan"),
    itl_p50_s=0.02,
    max_model_len=131_072,
)


def test_context_in_flight_weighs_requests_by_their_time() -> None:
    lengths = saturated_lengths(SATURATED, 131_072)
    prompts, outputs = (stream(1, name).standard_normal(400_000) for name in ("prompt", "output"))
    prompt, output = lengths.prompts(prompts), lengths.outputs(outputs)
    in_flight = np.average(prompt + output / 2, weights=output)
    assert lengths.context_in_flight_tokens() == pytest.approx(in_flight, rel=0.02)


def test_fit_and_replay_take_the_same_lengths() -> None:
    seen = observe(SATURATED)
    assert not isinstance(seen, str)
    lengths = saturated_lengths(SATURATED, 131_072)
    assert seen.kv_tokens == pytest.approx(64 * lengths.context_in_flight_tokens())
    load = replay_load(SATURATED, None, run_engine(SATURATED), AffineCurve(fixed_s=0.01), 1)
    assert load.data.trace is not None
    prompts, outputs = load.data.trace.prompt_tokens, load.data.trace.output_tokens
    assert np.average(prompts + outputs / 2, weights=outputs) == pytest.approx(seen.kv_tokens / 64, rel=0.15)
    assert f"prompts assumed lognormal, mean {CHAT_LENGTHS[0]:g}, cv {CHAT_LENGTHS[1]:g}" in load.notes


def test_measured_lengths_are_not_replaced() -> None:
    run = run_of(load_type="saturated_closed_loop", prompt_tokens_mean=300.0, output_tokens_std=0.0)
    lengths = saturated_lengths(run, 4096)
    assert lengths.notes == ()
    assert lengths.context_in_flight_tokens() == pytest.approx(300 + 100 / 2, rel=0.01)


def test_nothing_is_longer_than_the_model_allows() -> None:
    lengths = saturated_lengths(SATURATED, 1024)
    assert lengths.prompts(np.array([9.0])).tolist() == [256]
    assert lengths.outputs(np.array([9.0])).tolist() == [512]
