"""The documents name only files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
TOP = "csrc|primitives|scenarios|special_distributed|tests|docs|golden"
IN_CODE = re.compile(rf"`((?:{TOP})/[\w./-]*|[\w-]+\.(?:py|sh|md|toml|txt))`")
LINK = re.compile(r"\]\(([\w./-]+)\)")


def missing(document: str, text: str) -> list[str]:
    """Paths that ``text``, the content of ``document``, names and that are not there."""
    names = [(ROOT, name) for name in IN_CODE.findall(text)]
    names += [((ROOT / document).parent, name) for name in LINK.findall(text)]
    known = {path.name for top in TOP.split("|") for path in (ROOT / top).glob("**/*")}
    return [name for base, name in names if not (base / name).exists() and name not in known]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    assert missing(document, (ROOT / document).read_text()) == []


def test_checker_catches_a_missing_file() -> None:
    assert missing("README.md", "see `primitives/nothing.py`") == ["primitives/nothing.py"]
    assert missing("README.md", "see [it](docs/nothing.md)") == ["docs/nothing.md"]
    assert missing("docs/x.md", "see [it](architecture.md) and `csrc/transport/`") == []
