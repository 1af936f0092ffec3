"""``testbed``: the commands, their output and exit codes.

Exit codes: 0 pass, 1 golden or invariant mismatch, 2 usage or missing input, 3 a run failed (crash,
hang, lost rank). With ``--json`` standard output holds one JSON document and nothing else.
"""

import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from primitives.bench import BenchFailed
from scenarios.bench import bench
from scenarios.cli_checkpoint import checkpoint
from scenarios.cli_convert import convert
from scenarios.cli_inference import freeze, generate, serve
from scenarios.cli_run import record, run
from scenarios.failures import RunFailed
from scenarios.terminal import (
    EXIT_FAILED,
    EXIT_MISMATCH,
    EXIT_PASS,
    EXIT_USAGE,
    echo_error,
    echo_json,
    json_option,
    print_table,
    progress_stream,
)

ExistingFile = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def testbed() -> None:
    """Proves bit for bit that a change to distributed training did not change the numbers."""


@testbed.command("list")
@click.option("--names", is_flag=True, help="Only the names, one a line.")
@json_option
def list_cases(names: bool, as_json: bool) -> int:
    """Lists the scenarios: scale, layout, ranks, golden."""
    from scenarios.commands import list_rows

    rows = list_rows()
    if as_json:
        echo_json(rows)
    elif names:
        click.echo("\n".join(dict.fromkeys(row["name"] for row in rows)))
    else:
        for row in rows:
            click.echo(f"{row['alias'] or '-':4} {row['family']}/{row['name']}")
            golden = "recorded" if row["golden"] else "not recorded"
            click.echo(
                f"       --scale {row['scale']:5} {row['layout']:12} {row['num_ranks']} ranks  "
                f"{row['test_type']:12} golden: {golden}"
            )
    return EXIT_PASS


@testbed.command()
@json_option
def doctor(as_json: bool) -> int:
    """Says what can run on this machine."""
    from scenarios.doctor import conclude, examine

    findings = examine()
    ready = all(finding.ok is not False for finding in findings)
    if as_json:
        facts = {finding.name: {"value": finding.value, "ok": finding.ok} for finding in findings}
        echo_json({"ready": ready, "conclusion": conclude(findings), "findings": facts})
    else:
        for finding in findings:
            mark = {None: " ", True: "+", False: "!"}[finding.ok]
            click.echo(f"{mark} {finding.name:20} {finding.value}")
        click.echo(conclude(findings))
    return EXIT_PASS if ready else EXIT_USAGE


@testbed.command()
@click.argument("golden", type=ExistingFile)
@click.argument("actual", type=ExistingFile)
@click.option(
    "--rules",
    type=click.Choice(["strict", "megatron"]),
    default="strict",
    show_default=True,
    help="megatron: Megatron-LM's own rules, for its golden files.",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    help="Metric for --rules megatron to judge; may be given again [lm loss, num-zeros].",
)
@click.option("--scale", type=click.Choice(["ci", "full"]), help="Where a file holds both.")
@json_option
def compare(
    golden: Path,
    actual: Path,
    rules: str,
    metrics: tuple[str, ...],
    scale: str | None,
    as_json: bool,
) -> int:  # fmt: skip
    """Compares ACTUAL (a run's folder, its metrics.jsonl, or a golden file) with GOLDEN."""
    from scenarios.compare_files import compare_files

    if metrics and rules != "megatron":
        raise click.UsageError("--metric belongs to --rules megatron; strict judges every metric")
    result = compare_files(golden, actual, rules=rules, metrics=metrics, scale=scale)
    if as_json:
        echo_json(result.as_json())
    else:
        click.echo("\n".join(result.lines()))
    return EXIT_PASS if result.passed else EXIT_MISMATCH


@testbed.command()
@click.argument("dumps", nargs=-1, required=True, type=ExistingFile, metavar="DUMP...")
@click.option(
    "--last",
    "num_rows",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="Calls to show.",
)
@json_option
def flight(dumps: tuple[Path, ...], num_rows: int, as_json: bool) -> int:  # fmt: skip
    """Merges the flight recorder's DUMPs (files or folders) of all ranks into one timeline.

    Says which rank is behind, where calls differ, and who never came; exit code 1 if any.
    """
    from scenarios.flight import merge, read_dumps, table

    merged = merge(read_dumps(dumps))
    if as_json:
        echo_json(merged.as_json())
    else:
        print_table(table(merged, num_rows))
        click.echo(f"dumps of rank {', '.join(map(str, merged.ranks))}")
        for problem in merged.problems:
            click.echo(f"! {problem}")
    return EXIT_MISMATCH if merged.problems else EXIT_PASS


@testbed.command()
@click.option("--only", "ids", multiple=True, metavar="ID", help="This fault; may be given again.")
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Play every fault so often.",
)
@json_option
def faults(ids: tuple[str, ...], repeat: int, as_json: bool) -> int:  # fmt: skip
    """Plays faults on small jobs: each must end soon, with an error that says who and where."""
    from scenarios.faults.catalogue import select
    from scenarios.faults.play import play, table

    results = []
    for fault in select(ids) * repeat:
        results.append(play(fault))
        if not as_json:
            click.echo(results[-1].line(), err=True)
    if as_json:
        echo_json([result.as_json() for result in results])
    else:
        print_table(table(results))
    return EXIT_PASS if all(result.passed for result in results) else EXIT_MISMATCH


@testbed.group()
def data() -> None:
    """Makes training data."""


@data.command("build")
@click.argument("texts", nargs=-1, required=True, type=ExistingFile, metavar="TEXT...")
@click.option(
    "--tokenizer",
    required=True,
    metavar="bytes|TOKENIZER_JSON",
    help="bytes: one token per byte; or the tokenizer.json of a Hugging Face model.",
)
@click.option(
    "-o",
    "--output",
    "prefix",
    required=True,
    type=ExistingFile,
    metavar="PREFIX",
    help="PREFIX.bin, PREFIX.idx and PREFIX.json are written.",
)
@json_option
def build_data(texts: tuple[Path, ...], tokenizer: str, prefix: Path, as_json: bool) -> int:
    """Turns text (blank lines between documents, or .jsonl) into Megatron's token files."""
    from scenarios.data.indexed import build
    from scenarios.progress import show_count

    with show_count(progress_stream(as_json), "tokens") as on_count:
        facts = build(texts, tokenizer, prefix, progress=on_count)
    if as_json:
        echo_json({"prefix": str(prefix), **asdict(facts)})
    else:
        click.echo(
            f"{prefix}.bin, .idx, .json: {facts.num_documents} documents, "
            f"{facts.num_tokens} tokens, vocabulary of {facts.vocab_size}"
        )
    return EXIT_PASS


for command in (run, record, bench, convert, checkpoint, serve, generate, freeze):
    testbed.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; user errors are one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = testbed.main(given, prog_name="testbed", standalone_mode=False, obj=given)
        return code if isinstance(code, int) else EXIT_PASS
    except click.ClickException as error:
        return _fail(given, EXIT_USAGE, error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return _fail(given, EXIT_FAILED, "interrupted")
    except RunFailed as error:
        return _fail(given, EXIT_FAILED, str(error), error.as_json())
    except BenchFailed as error:
        return _fail(given, EXIT_FAILED, str(error))
    except SystemExit:
        # Only click leaves so, with the code of a mismatch: nobody reads our output any more.
        return EXIT_FAILED
    except (ValueError, OSError) as error:
        return _fail(given, EXIT_USAGE, str(error))
    except Exception as error:
        traceback.print_exc()
        return _fail(given, EXIT_FAILED, f"a bug in testbed: {type(error).__name__}: {error}")


def _fail(given: list[str], code: int, message: str, more: dict[str, Any] | None = None) -> int:
    line = echo_error(message)
    if "--json" in given:
        echo_json({"error": more or {"message": line}, "exit_code": code})
    return code
