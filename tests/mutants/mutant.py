"""One small edit of the Python code that a run must be judged failed for, and how it is played."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("scenarios", "primitives")
FIRST_RESUMED_STEP = Path(__file__).with_name("resume_early.py")
LIMIT_S = 300
NOTICED = ("ReplicasDiffer", "CheckpointCorrupt", "CollectiveMismatch")
"""Errors by which the ranks of a run judge themselves; any other only says that an edit crashes."""

Outcome = Literal["pass", "differs", "noticed", "broken"]


@dataclass(frozen=True)
class Edit:
    """One piece of text that takes the place of another."""

    file: str
    """Relative to the root of the tree."""
    old: str
    """Stands exactly once in the file."""
    new: str

    def apply(self, root: Path) -> None:
        """Edits the file.

        Raises:
            ValueError: the old text is not there, or more than once.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1:
            raise ValueError(
                f"{self.file}: expected the text to edit once, got it {count} times; "
                f"the catalogue of mutants must follow the code:\n{self.old}"
            )
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


@dataclass(frozen=True)
class Play:
    """A run against the golden: the first steps of a case in one layout."""

    case: str
    layout: str
    steps: int = 3
    """Of which the learning rate is 0 in the first."""
    resumes: bool = False
    """Also saves, resumes in new processes and repeats the rest; see resume_early.py."""

    def __str__(self) -> str:
        return f"{self.case} {self.layout}, {'resumed' if self.resumes else f'{self.steps} steps'}"

    def command(self, out: Path) -> list[str]:
        """The command line that plays it and prints one JSON document."""
        if self.resumes:
            return [sys.executable, str(FIRST_RESUMED_STEP), self.case, self.layout, str(out)]
        arguments = ["--layouts", self.layout, "--steps", str(self.steps), "--out", str(out)]
        return [
            *(sys.executable, "-m", "scenarios", "run", self.case),
            *(*arguments, "--timeout", "60", "--json"),
        ]


@dataclass(frozen=True)
class Mutant:
    """A named fault."""

    name: str
    breaks: str
    """What the edit takes away, for people."""
    play: Play
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Result:
    """How a play was judged."""

    outcome: Outcome
    first: str
    """The first difference, or what the ranks noticed."""

    @property
    def judged_failed(self) -> bool:
        """By the comparison or by the ranks; a crash of the edited code does not count."""
        return self.outcome in ("differs", "noticed")


def copy_tree(folder: Path) -> Path:
    """The Python code in a new folder; golden and built extension are links to the real ones."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    (folder / "golden").symlink_to(ROOT / "golden")
    for extension in (ROOT / "primitives").glob("_C*.so"):
        (folder / "primitives" / extension.name).symlink_to(extension)
    return folder


def play(tree: Path, what: Play, out: Path) -> Result:
    """Plays from a copied tree, with whatever edits it has."""
    ended = subprocess.run(
        what.command(out),
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    return judge(ended.returncode, ended.stdout, ended.stderr)


def judge(code: int, output: str, errors: str) -> Result:
    """From exit code and output of a play."""
    try:
        document = json.loads(output)
        (row,) = document["layouts"]
        detail = str(row["detail"]).split("; logs: ")[0]
    except (ValueError, KeyError):
        return Result("broken", f"exit code {code}: {(errors or output).strip()[-400:]}")
    if code == 0:
        return Result("pass", "all bits equal")
    if code == 1 and detail:
        return Result("differs", detail)
    if code == 3 and any(name in detail for name in NOTICED):
        return Result("noticed", detail)
    return Result("broken", f"exit code {code}: {detail}")
