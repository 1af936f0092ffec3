"""``testbed checkpoint``: what lies in a folder of checkpoints, and whether it is whole."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from scenarios.terminal import EXIT_MISMATCH, EXIT_PASS, echo_json, json_option, print_table

if TYPE_CHECKING:
    from primitives.checkpoint.survey import Found


@click.group()
def checkpoint() -> None:
    """Lists and verifies checkpoints; changes nothing."""


@checkpoint.command("list")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def list_checkpoints(path: Path, as_json: bool) -> int:
    """Lists the checkpoints in PATH; file contents are not read. Exit code 1 if one is damaged."""
    return _show(path, as_json, digests=False)


@checkpoint.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def verify(path: Path, as_json: bool) -> int:
    """Reads every byte of the checkpoints in PATH, or of the one PATH is.

    Exit code 1 if a file is missing, foreign or changed; its name is printed.
    """
    return _show(path, as_json, digests=True)


def _show(path: Path, as_json: bool, *, digests: bool) -> int:
    from primitives.checkpoint.survey import survey

    found = survey(path, digests=digests)
    whole = "verified" if digests else "listed"
    latest = max((one.generation or 0 for one in found), default=0)
    if as_json:
        rows = [one._asdict() | {"path": str(one.path)} for one in found]
        echo_json([row | {"latest": row["generation"] == latest} for row in rows])
    else:
        print_table(_table(found, latest, whole))
        for one in found:
            if one.problem is not None:
                click.echo(f"! {one.problem}")
    return EXIT_PASS if all(one.problem is None for one in found) else EXIT_MISMATCH


def _table(found: "list[Found]", latest: int, whole: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for head in ("step", "ranks", "files", "bytes", "tensors", "elements"):
        table.add_column(head, justify="right")
    table.add_column("state")
    for one in found:
        numbers = (one.step, one.world_size, one.num_files, one.nbytes, one.num_tensors, one.numel)
        state = whole if one.problem is None else "damaged"
        state += ", latest" if one.generation == latest else ""
        table.add_row(*("-" if number is None else str(number) for number in numbers), state)
    return table
