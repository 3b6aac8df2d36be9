"""A real vLLM server on one core, measured for half a minute, becomes a profile that simulates.

The machine may be busy with other things, so nothing here depends on how fast it is.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from calibrate.calibrate_command import command
from calibrate.measure.files import MeasurementFolder
from calibrate.measure.fleet import ROUTER_FILE, measure_fleet
from calibrate.measure.measured_experts import CALIBRATED_FILE, without_profiles
from calibrate.measure.router import RouterCosts
from real.experts.expert_server import port_is_free
from sim.fleet_file import load_fleet, parse_fleet
from sim.run import simulate

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make install-cpu)"),
]

FILE = """
workload:
  classes:
    code: {{prompt_tokens: {{distribution: uniform, min: 16, max: 200}}, output_tokens: 20}}
    chat: {{prompt_tokens: 40, output_tokens: {{distribution: uniform, min: 4, max: 40}}}}
  load: {{kind: closed_loop, users: 4}}
x-engine: &engine
  max_model_len: 1024
  max_num_seqs: 16
  max_num_batched_tokens: 512
  block_size: 128
  num_gpu_blocks_override: 129
  dtype: float32
  enforce_eager: true
  async_scheduling: false
  generation_config: vllm
fleets:
  two:
    router: {{}}
    experts:
      code: &expert {{model: laptop-16m, gpu: CPU, cores: 1, engine: *engine}}
      chat: *expert
run: {{requests: 40, replications: 1}}
serve: {{port: {port}, metrics_port: {metrics_port}, expert_port: {expert_port}}}
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = next(port for port in range(25100, 60000, 10) if all(port_is_free(port + place) for place in range(3)))
    file = parse_fleet(FILE.format(port=base, metrics_port=base + 1, expert_port=base + 2))
    out = tmp_path_factory.mktemp("calibration")
    path = measure_fleet(file, "two", minutes=0.5, out=out, messages=Console(file=sys.stderr))
    assert path == out / CALIBRATED_FILE
    return out


def test_every_logged_batch_is_the_simulated_schedulers(measured: Path) -> None:
    folder = MeasurementFolder.existing(measured / "code")
    assert folder.meta is not None
    assert folder.iterations["matched"].mean() > 0.99
    assert folder.meta.num_gpu_blocks == 129
    assert folder.meta.expert.engine_version.startswith("vLLM ")


def test_live_batches_agree(measured: Path) -> None:
    result = CliRunner().invoke(command, ["batches", str(measured / "code"), "--at-least", "0.8"])
    assert result.exit_code == 0, result.output


def test_the_calibrated_file_simulates_as_it_is(measured: Path) -> None:
    file = load_fleet(measured / CALIBRATED_FILE)
    assert file.fleets["two"].experts["code"].profile == file.fleets["two"].experts["chat"].profile
    sources = simulate(file, workers=1).summary
    assert len(sources)
    costs = RouterCosts.model_validate_json((measured / ROUTER_FILE).read_text())
    router = file.fleets["two"].router
    assert router is not None
    assert router.per_request_s == costs.per_request_s > 0
    assert costs.per_output_token_s > 0


def test_what_was_measured_is_not_measured_again(measured: Path) -> None:
    before = (measured / "code" / "meta.json").read_bytes()
    file = load_fleet(measured / CALIBRATED_FILE)
    measure_fleet(without_profiles(file), "two", minutes=0.5, out=measured, messages=Console(file=sys.stderr))
    assert (measured / "code" / "meta.json").read_bytes() == before
