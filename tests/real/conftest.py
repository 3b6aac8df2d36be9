"""What all tests with real engines have: when one fails, the ends of its logs are shown."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.served_fleet import log_ends


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a failed test what is in the folders of logs that it was given or its fleet has."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        values: list[Any] = list(item.funcargs.values())
        folders = {
            getattr(value, "logs", value) for value in values if hasattr(value, "logs") or isinstance(value, Path)
        }
        for folder in folders:
            if isinstance(folder, Path) and folder.is_dir():
                report.sections.append((f"logs in {folder}", log_ends(folder)))
    return report
