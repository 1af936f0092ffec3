"""The layers hold: csrc < primitives < scenarios < special_distributed, tests."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("primitives", "scenarios", "special_distributed", "tests")
# A layer may import itself and everything below; tests and special_distributed are both on top.
ALLOWED = {
    "primitives": {"primitives"},
    "scenarios": {"primitives", "scenarios"},
    "special_distributed": {"primitives", "scenarios", "special_distributed"},
    "tests": {"primitives", "scenarios", "special_distributed", "tests"},
}
TORCH_HEADER = re.compile(r'#include\s*[<"](torch|ATen|c10|pybind11)/')


def upward_imports(layer: str, source: str) -> list[str]:
    """Project modules that ``source``, a file of ``layer``, imports against the order."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append("." * node.level + (node.module or ""))
    return [
        m
        for m in modules
        if m.startswith(".")
        or (m.split(".")[0] in LAYERS and m.split(".")[0] not in ALLOWED[layer])
    ]


@pytest.mark.parametrize("layer", LAYERS)
def test_no_upward_import(layer: str) -> None:
    files = sorted((ROOT / layer).glob("**/*.py"))
    assert files
    wrong = {str(f.relative_to(ROOT)): upward_imports(layer, f.read_text()) for f in files}
    assert {file: modules for file, modules in wrong.items() if modules} == {}


def test_torch_headers_only_in_bindings() -> None:
    kinds = {".h", ".hpp", ".cpp", ".cu", ".cuh"}
    files = [f for f in (ROOT / "csrc").glob("**/*") if f.suffix in kinds]
    assert len(files) > 5
    wrong = [
        str(f.relative_to(ROOT))
        for f in files
        if f.parent.name != "bindings" and TORCH_HEADER.search(f.read_text())
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("primitives", "from scenarios.golden import Golden"),
        ("primitives", "def f():\n    import scenarios.cli as cli"),
        ("scenarios", "if True:\n    from tests import something"),
        ("scenarios", "import special_distributed.examples"),
        ("primitives", "from . import errors"),
    ],
)
def test_checker_catches_upward_import(layer: str, source: str) -> None:
    assert upward_imports(layer, source)


def test_checker_allows_downward_import() -> None:
    assert upward_imports("scenarios", "import torch, primitives.errors, scenarios.golden") == []


def test_checker_catches_torch_header() -> None:
    assert TORCH_HEADER.search("#include <ATen/ATen.h>")
    assert TORCH_HEADER.search('#include "torch/csrc/utils/pybind.h"')
    assert not TORCH_HEADER.search('#include "transport/segment.hpp"')
