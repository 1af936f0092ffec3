"""What commands print: text, one JSON document, or one line of error."""

import json
import sys
from typing import Any

import click

EXIT_PASS, EXIT_MISMATCH, EXIT_USAGE, EXIT_FAILED = range(4)

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


def echo_json(document: object) -> None:
    """Prints the one document of ``--json``."""
    click.echo(json.dumps(document, indent=1, allow_nan=False))


def echo_error(message: str) -> str:
    """Prints an error as one line on standard error, and returns the line."""
    line = " ".join(message.split())
    click.echo(f"testbed: error: {line}", err=True)
    return line


def print_table(table: Any) -> None:
    """Prints a table of rich: what fits in a terminal, whole lines in a file or a pipe."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=240)).print(table)


def progress_stream(as_json: bool) -> Any:
    """Where progress is shown: standard output, unless that holds a JSON document."""
    return sys.stderr if as_json else sys.stdout
