"""Tests against PyTorch and Captum: marked `oracle`, skipped where those are not installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
MISSING = [name for name in ("torch", "captum", "timm") if find_spec(name) is None]

if not MISSING:
    from tests.oracle.nets import import_torchvision

    import_torchvision()  # before anything imports timm


class _SkippedModule(pytest.Module):
    """A test file that can't be imported here, reported as skipped."""

    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        raise pytest.skip.Exception(
            f"needs {', '.join(MISSING)}: pip install 'onnxplain[oracle]'", allow_module_level=True
        )


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    return _SkippedModule.from_parent(parent, path=module_path) if MISSING else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.oracle)
