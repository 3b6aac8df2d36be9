import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sim.profile import ASSUMED_ERROR_GROWTH, Parameter, Profile, ProfileCurve, ProfileError, load_profile
from sim.service_curve import CurveSource, IterationWork


def parameter(value: float) -> dict[str, float]:
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def document(**changes: Any) -> dict[str, Any]:
    return {
        "format_version": 2,
        "name": "llama-3-8b on H100",
        "expert": {
            "model": "llama-3-8b",
            "quantization": "bf16",
            "gpu": "H100-SXM",
            "tensor_parallel_size": 1,
            "engine": {"max_num_seqs": 256},
            "engine_version": "vLLM 0.26.0",
        },
        "parameters": {
            "kind": "terms",
            "per_iteration": parameter(1e-3),
            "weights": parameter(5e-3),
            "per_token": parameter(2e-5),
            "per_attention_pair": parameter(1e-9),
            "per_prefill_chunk": parameter(1e-4),
            "per_decode": parameter(1e-5),
            "per_kv_token": parameter(4e-8),
        },
        "residuals": {
            "measurements": 5000,
            "what": "iterations",
            "held_out": False,
            "mean_error": 0.001,
            "median_absolute_error": 0.02,
            "p90_absolute_error": 0.06,
        },
        "range": {"max_decodes": 256, "max_decode_kv_tokens": 400_000, "max_prefill_tokens": 8192},
        "cuda_graph_sizes": [1, 2, 4, 8, 16, 512],
        "provenance": "made up for this test",
        "licence": "none",
        **changes,
    }


def write(folder: Path, content: object) -> Path:
    path = folder / "profile.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_profile_survives_a_round_trip(tmp_path: Path) -> None:
    profile = Profile.model_validate(document())
    assert load_profile(write(tmp_path, profile.model_dump_json())) == profile


def test_iteration_is_the_sum_of_its_terms() -> None:
    curve = ProfileCurve(Profile.model_validate(document(cuda_graph_sizes=[])))
    work = IterationWork(1000, 2, 400_000.0, 1200, 50, 20_000)
    expected_s = 1e-3 + 1050 * 2e-5 + 400_000 * 1e-9 + 2 * 1e-4 + 50 * 1e-5 + 21_200 * 4e-8
    assert curve.iteration_s(work) == pytest.approx(expected_s)


def test_small_batch_takes_the_time_to_read_the_weights() -> None:
    curve = ProfileCurve(Profile.model_validate(document()))
    assert curve.decode_piece(1, 0).fixed_s == pytest.approx(1e-3 + 5e-3 + 1e-5)


HOST = {
    "per_iteration": parameter(2e-3),
    "per_request": parameter(4e-5),
    "in_pieces": parameter(4e-3),
    "without_graph": parameter(13e-3),
    "per_prefill_chunk": parameter(3e-4),
}


def with_host() -> Profile:
    made = document()
    made["parameters"]["host"] = HOST
    return Profile.model_validate(made)


@pytest.mark.parametrize(
    ("work", "host_s"),
    [
        (IterationWork(0, 0, 0.0, 0, 500, 5000), 2e-3 + 500 * 4e-5),  # one graph
        (IterationWork(10, 2, 30.0, 10, 3, 30), 2e-3 + 5 * 4e-5 + 4e-3 + 2 * 3e-4),  # in pieces
        (IterationWork(513, 1, 0.0, 513, 0, 0), 2e-3 + 4e-5 + 4e-3 + 3e-4 + 13e-3),  # kernel by kernel
        (IterationWork(0, 0, 0.0, 0, 600, 600), 2e-3 + 600 * 4e-5 + 4e-3 + 13e-3),
    ],
)
def test_an_iteration_takes_no_less_than_its_host(work: IterationWork, host_s: float) -> None:
    device_s = ProfileCurve(Profile.model_validate(document())).iteration_s(work)
    assert ProfileCurve(with_host()).iteration_s(work) == pytest.approx(max(device_s, host_s))


@given(st.integers(1, 900), st.integers(0, 3_000_000))
def test_decode_piece_of_host_or_device_gives_the_iteration_time(decodes: int, kv_tokens: int) -> None:
    curve = ProfileCurve(with_host())
    piece = curve.decode_piece(decodes, kv_tokens)
    work = IterationWork(0, 0, 0.0, 0, decodes, kv_tokens)
    assert piece.fixed_s + piece.per_kv_token_s * kv_tokens == pytest.approx(curve.iteration_s(work))
    assert kv_tokens <= piece.until_kv_tokens


def test_batch_is_padded_to_the_next_captured_size_and_not_above_the_largest() -> None:
    curve = ProfileCurve(Profile.model_validate(document()))
    assert curve.decode_piece(17, 0).fixed_s == pytest.approx(1e-3 + 512 * 2e-5 + 17 * 1e-5)
    assert curve.decode_piece(513, 0).fixed_s == pytest.approx(1e-3 + 513 * 2e-5 + 513 * 1e-5)


@given(st.integers(1, 2000), st.integers(1, 5_000_000))
def test_decode_piece_gives_the_iteration_time(decodes: int, kv_tokens: int) -> None:
    curve = ProfileCurve(Profile.model_validate(document()))
    piece = curve.decode_piece(decodes, kv_tokens)
    in_closed_form = piece.fixed_s + piece.per_kv_token_s * kv_tokens
    measured = curve.iteration_s(IterationWork(0, 0, 0.0, 0, decodes, kv_tokens))
    assert piece.until_kv_tokens == math.inf
    assert math.isclose(in_closed_form, measured, rel_tol=1e-12)


KNOTS = [{"tokens": n, "seconds": parameter(s)} for n, s in ((4, 2e-3), (16, 2e-3), (64, 9e-3))]


def with_knots(knots: list[dict[str, Any]]) -> dict[str, Any]:
    content = document(cuda_graph_sizes=[])
    content["parameters"] |= {"matrix_knots": knots, "weights": parameter(0.0)}
    return content


def test_matrix_work_runs_through_its_knots_and_on_with_the_last_slope() -> None:
    curve = ProfileCurve(Profile.model_validate(with_knots(KNOTS)))
    matrix_s = {n: curve.decode_piece(n, 0).fixed_s - 1e-3 - n * 1e-5 for n in (1, 4, 10, 16, 40, 64, 164)}
    assert matrix_s == pytest.approx(
        {1: 0.0, 4: 2e-3, 10: 2e-3, 16: 2e-3, 40: 5.5e-3, 64: 9e-3, 164: 9e-3 + 100 * 2e-5}, abs=1e-12
    )


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(1, 300))
def test_matrix_work_with_knots_never_falls(prefill_tokens: int, decodes: int, more: int) -> None:
    curve = ProfileCurve(Profile.model_validate(with_knots(KNOTS)))
    work = IterationWork(prefill_tokens, 1, 0.0, 0, decodes, 0)
    larger = work._replace(decodes=decodes + more)
    assert curve.iteration_s(larger) >= curve.iteration_s(work)


@pytest.mark.parametrize("knots", [[KNOTS[1], KNOTS[0]], [KNOTS[0], {"tokens": 16, "seconds": parameter(1e-3)}]])
def test_knots_that_fall_are_refused(knots: list[dict[str, Any]]) -> None:
    with pytest.raises(ValidationError, match="matrix_knots must ascend in tokens and never fall in seconds"):
        Profile.model_validate(with_knots(knots))


works = st.builds(
    IterationWork,
    st.integers(0, 8192),
    st.integers(0, 64),
    st.floats(0, 1e8),
    st.integers(0, 1_000_000),
    st.integers(1, 1024),
    st.integers(1, 5_000_000),
)


@given(works, st.sampled_from(IterationWork._fields), st.integers(1, 2000))
def test_more_of_any_work_never_takes_less_time(work: IterationWork, field: str, more: int) -> None:
    curve = ProfileCurve(Profile.model_validate(document()))
    larger = work._replace(**{field: getattr(work, field) + more})
    assert curve.iteration_s(larger) >= curve.iteration_s(work)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"value": 1.0}, "either low and high are needed, or assumed"),
        ({"value": 1.0, "low": 0.5}, "either low and high are needed, or assumed"),
        ({"value": 1.0, "low": 0.5, "high": 2.0, "assumed": "a guess"}, "measured, with low and high, or assumed"),
    ],
)
def test_a_value_has_an_interval_or_says_where_it_is_from(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Parameter.model_validate(given)
    assert Parameter(value=1.0, assumed="a guess").low is None


def source_with(**reach: Any) -> CurveSource:
    text = document()
    text["range"] |= {"error_growth_per_doubling": 1.5} | reach
    return ProfileCurve(Profile.model_validate(text)).source


def test_the_error_of_a_prediction_grows_with_every_doubling_beyond_the_range() -> None:
    source = source_with()
    assert source.error_p90 == 0.06
    assert source.widening(256, 400_000, 8192) == 1
    assert source.widening(512, 0, 0) == pytest.approx(1 + 1.5)
    assert source.widening(1024, 0, 0) == pytest.approx(1 + 1.5 * 2)
    assert source.widening(512, 3_200_000, 8192) == pytest.approx(1 + 1.5 * 3)
    assert source.widening(1, 1, 16_384) == pytest.approx(1 + 1.5)


@given(st.tuples(*[st.integers(0, 10_000_000)] * 3), st.integers(0, 2), st.integers(1, 1_000_000))
def test_an_interval_never_narrows_with_more_work_and_widens_outside_the_range(
    work: tuple[int, int, int], place: int, more: int
) -> None:
    source = source_with()
    larger = [value + more * (index == place) for index, value in enumerate(work)]
    assert source.widening(*larger) >= source.widening(*work) >= 1
    reach = (source.max_decodes, source.max_decode_kv_tokens, source.max_prefill_tokens)
    assert (source.widening(*work) > 1) == any(value > limit for value, limit in zip(work, reach, strict=True) if limit)


def test_a_profile_that_does_not_say_takes_the_usual_growth() -> None:
    source = ProfileCurve(Profile.model_validate(document())).source
    assert source.widening(512, 0, 0) == 1 + ASSUMED_ERROR_GROWTH


def test_source_carries_name_worth_and_range() -> None:
    source = ProfileCurve(Profile.model_validate(document())).source
    assert source.label == "llama-3-8b on H100"
    assert (source.max_decodes, source.max_decode_kv_tokens, source.max_prefill_tokens) == (256, 400_000, 8192)
    assert "5000 iterations of vLLM 0.26.0 on H100-SXM, median error 2.0%" in source.detail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"profile .*profile\.json: file: Invalid JSON"),
        (document(format_version=1), r"profile\.json: format_version: Input should be 2, got 1"),
        (document(extra=1), r"profile\.json: extra: Extra inputs are not permitted, got 1"),
        ({k: v for k, v in document().items() if k != "range"}, r"profile\.json: range: Field required$"),
        (document(cuda_graph_sizes=[4, 2]), r"cuda_graph_sizes must ascend without repeats, got \[4, 2\]"),
    ],
)
def test_mistake_is_told_with_file_and_field(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        load_profile(write(tmp_path, content))


def test_negative_term_and_disordered_interval_are_two_lines(tmp_path: Path) -> None:
    content = document()
    content["parameters"]["per_token"] = {"value": -1.0, "low": 0.0, "high": 0.0}
    content["parameters"]["weights"] = {"value": 3.0, "low": 0.0, "high": 2.0}
    with pytest.raises(ProfileError) as caught:
        load_profile(write(tmp_path, content))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "parameters.terms.weights: Value error, low <= value <= high must hold, got 0, 3, 2" in lines[0]
    assert "parameters.terms.per_token.value: Input should be greater than or equal to 0, got -1.0" in lines[1]


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"nowhere\.json: cannot be read: No such file or directory"):
        load_profile(tmp_path / "nowhere.json")
