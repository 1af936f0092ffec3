"""Tests in this folder are marked ``gpu`` and skipped, with the reason, where there is no GPU."""

from pathlib import Path

import pytest
from gpu_machine import missing_gpu

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks and skips; what goes wrong with a GPU present is a failure."""
    reason = missing_gpu()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
