"""The server's logging configuration suits the formatters of every vLLM it may meet."""

import logging
import logging.config
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from real.experts.iteration_log import logging_config


class Formatter026(logging.Formatter):
    """As in vLLM 0.26: of format, date format and style alone."""

    def __init__(self, fmt: str, datefmt: str | None = None, style: Any = "%"):
        super().__init__(fmt, datefmt, style)


class Formatter032(logging.Formatter):
    """As in vLLM 0.32: a level as well, if it is given by name."""

    def __init__(self, fmt: str, datefmt: str | None = None, style: Any = "%", *, log_level: str | None = None):
        super().__init__(fmt, datefmt, style)


@pytest.fixture
def vllm_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The logger called vllm, put back afterwards."""
    for name in ("vllm", "vllm.logging_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    logger = logging.getLogger("vllm")
    before = list(logger.handlers), logger.level, logger.propagate
    yield logger
    logger.handlers, logger.level, logger.propagate = before


@pytest.mark.parametrize("formatter", [Formatter026, Formatter032])
def test_the_configuration_makes_the_formatter(
    formatter: type[logging.Formatter], vllm_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = sys.modules["vllm.logging_utils"]
    monkeypatch.setattr(sys.modules["vllm"], "logging_utils", utils, raising=False)
    monkeypatch.setattr(utils, "NewLineFormatter", formatter, raising=False)
    logging.config.dictConfig(logging_config())
    (handler,) = vllm_logger.handlers
    assert type(handler.formatter) is formatter
    record = logging.LogRecord("vllm", logging.INFO, "loggers.py", 199, "Engine 000: Iteration(3): ...", (), None)
    record.fileinfo = "loggers.py"
    assert f" {record.created:.6f} [loggers.py:199] Engine 000: Iteration(3)" in handler.format(record)
