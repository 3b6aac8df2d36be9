"""vLLM's iteration lines are read as they are, each once, with microseconds."""

import json
import logging
import logging.config
import time
from pathlib import Path

import pytest

from real.experts.iteration_log import IterationLog, logging_config, write_logging_config

# As vLLM 0.32.0 wrote them with this project's logging configuration.
REAL = """\
(MainProcess pid=8239) INFO 11-25 22:46:40 1795646800.359143 [loggers.py:199] Engine 000: Iteration(201): 0 context \
requests, 0 context tokens, 1 generation requests, 1 generation tokens, iteration elapsed time: 12.34 ms, CPU KV cache \
usage: 0.0%
(MainProcess pid=8239) INFO 11-25 22:46:40 1795646800.377770 [loggers.py:271] Engine 000: Avg prompt throughput: 3.2
(MainProcess pid=8239) INFO 11-25 22:46:40 1795646800.677770 [loggers.py:199] Engine 000: Iteration(202): 2 context \
requests, 256 context tokens, 3 generation requests, 40 generation tokens, iteration elapsed time: 102.39 ms, GPU KV \
cache usage: 10.4%
"""


def wall_s(ended_s: float) -> float:
    return ended_s + time.time() - time.monotonic()


def test_real_lines_are_read_with_every_figure(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(REAL)
    first, second = IterationLog(log).new_lines()
    assert (first.iteration, first.context_requests, first.generation_requests) == (201, 0, 1)
    assert first.elapsed_s == pytest.approx(0.01234)
    assert wall_s(first.ended_s) == pytest.approx(1795646800.359143, abs=0.05)
    assert second.ended_s - first.ended_s == pytest.approx(0.318627, abs=2e-6)
    assert (second.context_requests, second.context_tokens) == (2, 256)
    assert (second.generation_requests, second.generation_tokens) == (3, 40)
    assert second.kv_usage == pytest.approx(0.104)


def test_a_growing_log_gives_each_line_once_and_waits_for_half_ones(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = IterationLog(path)
    assert log.new_lines() == []
    cut = REAL.index("iteration elapsed")
    path.write_text(REAL[:cut])
    assert log.new_lines() == []
    path.write_text(REAL)
    assert [line.iteration for line in log.new_lines()] == [201, 202]
    assert log.new_lines() == []


def test_lines_of_an_earlier_start_can_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(REAL)
    start = path.stat().st_size
    with path.open("a") as file:
        file.write(REAL.replace("Iteration(201)", "Iteration(7)"))
    assert [line.iteration for line in IterationLog(path, start_bytes=start).new_lines()] == [7, 202]


def test_the_configuration_writes_lines_that_the_reader_understands(tmp_path: Path) -> None:
    config = json.loads(write_logging_config(tmp_path / "logging.json").read_text())
    assert config == logging_config()
    # vLLM's formatter, which adds the short file name, is not installed with this project.
    formatter = config["formatters"]["vllm"]
    config["formatters"]["vllm"] = {"format": formatter["format"].replace("fileinfo", "filename")}
    path = tmp_path / "log"
    config["handlers"]["vllm"] = {"class": "logging.FileHandler", "formatter": "vllm", "filename": str(path)}
    config["loggers"] = {"vllm-like": {"handlers": ["vllm"], "level": "INFO", "propagate": False}}
    logging.config.dictConfig(config)
    logger = logging.getLogger("vllm-like")
    before_s = time.monotonic()
    logger.info(REAL.partition("] ")[2].partition("\n")[0])
    after_s = time.monotonic()
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
    (line,) = IterationLog(path).new_lines()
    assert before_s - 0.01 <= line.ended_s <= after_s + 0.01
