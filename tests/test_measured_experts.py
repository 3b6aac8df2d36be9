"""Each different engine of a file is measured once, and the file with the profiles is a fleet file again."""

from pathlib import Path

import pytest

from calibrate.measure.files import MeasurementError
from calibrate.measure.measured_experts import calibrated_yaml, distinct_experts, write_text
from sim.fleet_file import LoadedFleetFile, load_fleet, parse_fleet
from sim.resolve import resolve_fleet
from tests.profiles import profile_json

TEXT = """
workload:
  classes: {code: {prompt_tokens: 100, output_tokens: 20}, chat: {prompt_tokens: 50, output_tokens: 30}}
  load: {kind: closed_loop, users: 4}
fleets:
  one:
    router: {policy: class, workers: 2}
    experts:
      code: {model: llama-3-8b, gpu: H100-SXM, replicas: 3}
      chat: {model: llama-3-8b, gpu: L40S}
  two:
    experts:
      code: {model: llama-3-8b, gpu: H100-SXM, engine: {max_num_seqs: 64}}
      chat: {model: llama-3-8b, gpu: H100-SXM}
"""


def loaded() -> LoadedFleetFile:
    return parse_fleet(TEXT)


def test_like_engines_are_one_and_different_ones_have_different_names() -> None:
    found = distinct_experts(loaded())
    assert [(each.name, each.places) for each in found] == [
        ("code", (("one", "code"), ("two", "chat"))),
        ("chat", (("one", "chat"),)),
        ("two-code", (("two", "code"),)),
    ]


def test_fleets_and_experts_can_be_chosen() -> None:
    assert [each.name for each in distinct_experts(loaded(), ["two"])] == ["code", "chat"]
    assert [each.name for each in distinct_experts(loaded(), (), ["chat"])] == ["chat", "two-chat"]


@pytest.mark.parametrize(
    ("fleets", "experts", "message"),
    [(["on"], [], "--fleet on: not in this file, did you mean"), ([], ["chad"], "--expert chad: no such expert")],
)
def test_an_unknown_name_is_told(fleets: list[str], experts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distinct_experts(loaded(), fleets, experts)


def test_the_calibrated_file_simulates_with_its_profiles_and_router_times(tmp_path: Path) -> None:
    (tmp_path / "code.profile.json").write_text(profile_json(model="llama-3-8b", gpu="H100-SXM"))
    text = calibrated_yaml(
        loaded(),
        {("one", "code"): "code.profile.json"},
        {"one": {"per_request_s": 1e-3, "per_output_token_s": 2e-5}},
        "written by a test\nin two lines",
    )
    assert text.startswith("# written by a test\n# in two lines\n")
    path = tmp_path / "fleet.calibrated.yaml"
    path.write_text(text)
    file = load_fleet(path)
    fleet = resolve_fleet(file, "one")
    assert [expert.curve.source.label for expert in fleet.experts] == ["other", "roofline, not calibrated"]
    assert fleet.router is not None
    assert (fleet.router.per_request_s, fleet.router.per_output_token_s, fleet.router.workers) == (1e-3, 2e-5, 2)
    assert resolve_fleet(file, "two").router is None


def test_a_file_that_cannot_be_written_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, where a folder is wanted")
    with pytest.raises(MeasurementError, match=r"router\.json: cannot be written .* is kept: make room"):
        write_text(tmp_path / "taken" / "router.json", "{}")
