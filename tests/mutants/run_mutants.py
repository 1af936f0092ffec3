"""Plays every mutant of the catalogue: each must be judged failed, and the unedited code must pass.

    python tests/mutants/run_mutants.py                 all of them
    python tests/mutants/run_mutants.py --only NAME     this one; may be given again
    python tests/mutants/run_mutants.py --list          only names them

Exit code 1 when a mutant survives, crashes, or the control fails.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from catalogue import MUTANTS
from mutant import Mutant, Outcome, Play, Result, copy_tree, play

WORDS: dict[Outcome, str] = {
    "pass": "SURVIVED",
    "differs": "judged failed",
    "noticed": "judged failed",
    "broken": "BROKEN",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", default=[])
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args(arguments)
    try:
        mutants = select(given.only)
    except ValueError as error:
        parser.error(str(error))
    if given.list:
        for mutant in mutants:
            print(f"{mutant.name:32} {mutant.breaks}  ({mutant.play})")
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        try:
            failures = play_all(mutants, Path(folder))
        except ValueError as error:
            failures = [str(error)]
    for failure in failures:
        print(f"! {failure}")
    word = "FAIL" if failures else "PASS"
    print(f"{word}  {len(mutants)} mutants, {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


def play_all(mutants: Sequence[Mutant], folder: Path) -> list[str]:
    """Plays control and mutants; gives what went wrong.

    Raises:
        ValueError: an edit does not fit the code.
    """
    # All edits are made first: a catalogue that does not fit the code is told at once.
    trees = [edited(mutant, folder / mutant.name) for mutant in mutants]
    failures = play_control(mutants, folder / "control")
    for mutant, tree in zip(mutants, trees, strict=True):
        result, wall_s = timed(tree, mutant.play, tree / "out")
        word = WORDS[result.outcome]
        print(f"{word:13}  {mutant.name}: {mutant.breaks}")
        print(f"{'':15}{mutant.play}, {wall_s:.1f} s: {result.first}", flush=True)
        if not result.judged_failed:
            failures.append(f"{word} {mutant.name}: {result.first}")
    return failures


def select(names: Iterable[str]) -> tuple[Mutant, ...]:
    """The mutants of these names, all without any.

    Raises:
        ValueError: there is none of a name.
    """
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"no mutant {unknown[0]!r}; known: {', '.join(by_name)}")
    return tuple(by_name[name] for name in names) or MUTANTS


def edited(mutant: Mutant, folder: Path) -> Path:
    """A new tree with the mutant's edits.

    Raises:
        ValueError: an edit does not fit the code.
    """
    tree = copy_tree(folder)
    for edit in mutant.edits:
        try:
            edit.apply(tree)
        except ValueError as error:
            raise ValueError(f"mutant {mutant.name}: {error}") from None
    return tree


def play_control(mutants: Sequence[Mutant], folder: Path) -> list[str]:
    """Plays the unedited code as the mutants are played; gives what failed."""
    tree = copy_tree(folder)
    longest: dict[tuple[str, str, bool], Play] = {}
    for mutant in mutants:
        key = (mutant.play.case, mutant.play.layout, mutant.play.resumes)
        if key not in longest or longest[key].steps < mutant.play.steps:
            longest[key] = mutant.play
    failures = []
    for number, what in enumerate(longest.values()):
        result, wall_s = timed(tree, what, tree / f"out{number}")
        print(f"{'control':13}  {what}, {wall_s:.1f} s: {result.first}", flush=True)
        if result.outcome != "pass":
            failures.append(f"the unedited code, {what}: {result.first}")
    return failures


def timed(tree: Path, what: Play, out: Path) -> tuple[Result, float]:
    """A play and its wall time in seconds."""
    start = time.monotonic()
    result = play(tree, what, out)
    return result, time.monotonic() - start


if __name__ == "__main__":
    sys.exit(main())
