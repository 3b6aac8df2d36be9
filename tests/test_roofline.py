import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.catalogue import find_gpu, find_model, find_quantization
from sim.cuda_graphs import capture_sizes, padded_tokens
from sim.factors import packaged_factors
from sim.roofline import Corrections, Roofline, default_front_end
from sim.service_curve import IterationWork, ServiceCurve


def roofline(
    model: str = "llama-3-8b",
    gpu: str = "H100-SXM",
    *,
    quantization: str = "bf16",
    tp: int = 1,
    max_num_seqs: int = 1024,
    enforce_eager: bool = False,
    async_scheduling: bool = True,
) -> Roofline:
    return Roofline(
        find_model(model),
        find_quantization(quantization),
        find_gpu(gpu),
        tensor_parallel_size=tp,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=8192,
        enforce_eager=enforce_eager,
        async_scheduling=async_scheduling,
    )


def decode(decodes: int, kv_tokens: int) -> IterationWork:
    return IterationWork(0, 0, 0.0, 0, decodes, kv_tokens)


def prefill(tokens: int) -> IterationWork:
    return IterationWork(tokens, 1, tokens * (tokens + 1) / 2, tokens, 0, 0)


CURVES: list[ServiceCurve] = [
    roofline(),
    roofline(enforce_eager=True),
    roofline("llama-3.2-1b", "L4", quantization="fp8", max_num_seqs=128),
    roofline("llama-3-70b", "A100-80GB", tp=4, async_scheduling=False),
    roofline("mixtral-8x7b", "H200", quantization="gptq"),
]

works = st.builds(
    IterationWork,
    st.integers(0, 8192),
    st.integers(0, 64),
    st.floats(0, 1e8),
    st.integers(0, 1_000_000),
    st.integers(1, 1024),
    st.integers(1, 5_000_000),
)


@settings(max_examples=300)
@given(st.sampled_from(CURVES), works, st.sampled_from(IterationWork._fields), st.integers(1, 2000))
def test_more_of_any_work_never_takes_less_time(
    curve: ServiceCurve, work: IterationWork, field: str, more: int
) -> None:
    larger = work._replace(**{field: getattr(work, field) + more})
    assert curve.iteration_s(larger) >= curve.iteration_s(work) * (1 - 1e-12)


@settings(max_examples=300)
@given(st.sampled_from(CURVES), st.integers(1, 2048), st.integers(1, 10_000_000))
def test_decode_piece_gives_the_iteration_time(curve: ServiceCurve, decodes: int, kv_tokens: int) -> None:
    piece = curve.decode_piece(decodes, kv_tokens)
    assert kv_tokens <= piece.until_kv_tokens
    in_closed_form = piece.fixed_s + piece.per_kv_token_s * kv_tokens
    assert math.isclose(in_closed_form, curve.iteration_s(decode(decodes, kv_tokens)), rel_tol=1e-12)


def test_graphs_leave_one_piece_and_launches_make_two() -> None:
    assert roofline().decode_piece(64, 1).until_kv_tokens == math.inf
    launch_bound = roofline("llama-3.2-1b", enforce_eager=True).decode_piece(8, 1)
    assert launch_bound.per_kv_token_s == 0
    assert 1 < launch_bound.until_kv_tokens < math.inf


def test_batch_runs_at_the_captured_size_above_it() -> None:
    curve = roofline()
    # from 257 to 272 only the work per sequence grows, at 273 the matrix work steps up to the next size
    within = curve.iteration_s(decode(272, 1000)) - curve.iteration_s(decode(271, 1000))
    step = curve.iteration_s(decode(273, 1000)) - curve.iteration_s(decode(272, 1000))
    assert step > 5 * within


def test_eager_engine_pays_its_launches_at_small_batches() -> None:
    assert roofline(enforce_eager=True).iteration_s(decode(1, 100)) > 1.5 * roofline().iteration_s(decode(1, 100))


@pytest.mark.parametrize("work", [decode(1, 100), decode(64, 64_000), prefill(4096)])
def test_more_gpus_take_less_time_but_not_in_proportion(work: IterationWork) -> None:
    times = [roofline("llama-3-70b", tp=tp).iteration_s(work) for tp in (1, 2, 4, 8)]
    for slower, faster in itertools.pairwise(times):
        assert slower / 2 < faster < slower


def test_all_reduce_over_pcie_costs_more_than_over_nvlink() -> None:
    def share(gpu: str) -> float:
        return roofline(gpu=gpu, tp=4).iteration_s(prefill(4096)) / roofline(gpu=gpu).iteration_s(prefill(4096))

    assert share("L40S") > 1.2 * share("A100-80GB")


@pytest.mark.parametrize("work", [decode(1, 100), decode(64, 64_000), prefill(4096)])
def test_fp8_is_faster_than_bf16(work: IterationWork) -> None:
    assert roofline(quantization="fp8").iteration_s(work) < roofline().iteration_s(work)


def test_int4_is_faster_in_decode_and_no_faster_in_prefill() -> None:
    assert roofline(quantization="awq").iteration_s(decode(1, 100)) < 0.6 * roofline().iteration_s(decode(1, 100))
    assert roofline(quantization="awq").iteration_s(prefill(8192)) == pytest.approx(
        roofline().iteration_s(prefill(8192)), rel=0.02
    )


def test_small_batch_of_a_mixture_reads_its_active_experts_only() -> None:
    mixture = roofline("mixtral-8x7b", "H200")
    one, many = mixture.iteration_s(decode(1, 100)), mixture.iteration_s(decode(32, 100))
    active_share = find_model("mixtral-8x7b").parameters_active / find_model("mixtral-8x7b").parameters_total
    assert one < many * (active_share + 0.1)


def test_decode_is_never_faster_than_reading_weights_and_kv() -> None:
    model, gpu = find_model("llama-3-8b"), find_gpu("H100-SXM")
    kv_tokens = 64 * 1000
    weights_bytes = 2 * (model.parameters_total - model.embedding_weights)
    floor_s = (weights_bytes + 2 * kv_tokens * model.kv_values_per_token) / gpu.bandwidth_bytes_per_s
    assert roofline().iteration_s(decode(64, kv_tokens)) > floor_s


def test_prefill_is_never_faster_than_its_multiply_adds() -> None:
    model, gpu = find_model("llama-3-8b"), find_gpu("H100-SXM")
    assert roofline().iteration_s(prefill(8192)) > 2 * model.linear_weights * 8192 / gpu.bf16_per_s


def test_synchronous_scheduling_adds_host_time() -> None:
    assert roofline(async_scheduling=False).iteration_s(decode(64, 1000)) > roofline().iteration_s(decode(64, 1000))


def test_source_says_not_calibrated_and_what_is_assumed() -> None:
    assert roofline().source.label == "roofline, not calibrated"
    assert "assumed to hold for MI300X" in roofline(gpu="MI300X").source.detail
    assert "4-bit" in roofline(quantization="awq").source.detail


def test_front_end_costs_are_positive() -> None:
    front_end = default_front_end()
    assert 0 < front_end.per_prompt_token_s < front_end.per_output_token_s < front_end.per_request_s


def test_capture_sizes_are_vllms() -> None:
    gpu = find_gpu("H100-SXM")
    sizes = capture_sizes(max_num_seqs=1024, max_num_batched_tokens=8192, gpu=gpu)
    assert sizes == (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
    assert capture_sizes(max_num_seqs=3, max_num_batched_tokens=8192, gpu=gpu) == (1, 2, 3, 4)
    assert capture_sizes(max_num_seqs=64, max_num_batched_tokens=100, gpu=gpu)[-2:] == (96, 100)
    assert capture_sizes(max_num_seqs=1024, max_num_batched_tokens=8192, gpu=find_gpu("B200"))[-1] == 1024


def test_padding_goes_up_to_the_next_captured_size() -> None:
    sizes = (1, 2, 4, 8)
    assert [padded_tokens(tokens, sizes) for tokens in (1, 3, 5, 8, 9)] == [1, 4, 8, 8, None]


@pytest.mark.parametrize("gpu", ["L40S", "L4", "RTX-4090", "A10G", "H100-PCIe"])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("megabytes", [8, 32, 128])
def test_a_large_all_reduce_over_pcie_takes_what_the_link_allows_and_at_most_twice_that(
    gpu: str, size: int, megabytes: int
) -> None:
    found = find_gpu(gpu)
    assert found.linked_by_pcie
    link_s = 2 * (size - 1) / size * megabytes * 1e6 / found.link_bandwidth_bytes_per_s
    seconds = packaged_factors().all_reduce(found, size).all_reduce_s(link_s)
    assert link_s < seconds < 2 * link_s


@pytest.mark.parametrize("size", [2, 4, 8])
def test_prefill_over_pcie_is_bounded_by_its_link(size: int) -> None:
    """The all-reduces of a chunk, two a layer, at no less than half of the link, beside everything else."""
    model, gpu = find_model("llama-3.1-70b"), find_gpu("L40S")
    tokens = 2048
    seconds, without_link_s = (
        Roofline(
            model,
            find_quantization("fp8"),
            gpu,
            tensor_parallel_size=size,
            max_num_seqs=256,
            max_num_batched_tokens=tokens,
            corrections=Corrections(all_reduce=share),
        ).iteration_s(prefill(tokens))
        for share in (1.0, 0.0)
    )
    link_s = 2 * model.layers * 2 * (size - 1) / size * tokens * model.hidden_size * 2 / gpu.link_bandwidth_bytes_per_s
    assert without_link_s < seconds < without_link_s + 2 * link_s


def test_nvlink_is_not_taken_for_pcie() -> None:
    assert not any(find_gpu(name).linked_by_pcie for name in ("A100-80GB", "H100-SXM", "H100-NVL", "H200", "B200"))
