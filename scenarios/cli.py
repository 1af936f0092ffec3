"""``testbed``: the commands, their output and exit codes.

Exit codes: 0 pass, 1 golden or invariant mismatch, 2 usage or missing input, 3 a run failed (crash,
hang, lost rank). With ``--json`` standard output holds one JSON document and nothing else.
"""

import json
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from primitives.bench import BenchFailed
from scenarios.bench import bench
from scenarios.convert_command import convert
from scenarios.failures import RunFailed

if TYPE_CHECKING:
    from scenarios.schema import Arithmetic

EXIT_PASS, EXIT_MISMATCH, EXIT_USAGE, EXIT_FAILED = range(4)

Command = TypeVar("Command", bound=Callable[..., Any])
ExistingFile = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
scale_option = click.option(
    "--scale", type=click.Choice(["ci", "full"]), default="ci", show_default=True,
    help="ci: every mechanism, small sizes; full: the sizes of the file.",
)  # fmt: skip


def run_options(command: Command) -> Command:
    """The options that ``run`` and ``record`` share."""
    for option in (
        click.option("--arithmetic", type=click.Choice(["canonical", "native"]),
                     default="canonical", show_default=True,
                     help="native: the library's kernels; goldens have tolerances."),
        click.option("--layout", metavar="LAYOUT", help="Like dp2 instead of the case's own."),
        click.option("--out", type=ExistingFile, help="New or empty folder [runs/CASE-TIME]."),
        click.option("--master-port", type=click.IntRange(0, 65535), default=0,
                     help="Port of the rendezvous [a free one]."),
        click.option("--timeout", "timeout_s", type=click.FloatRange(min=1), default=300.0,
                     show_default=True, help="Hang limit: seconds without a step."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def testbed() -> None:
    """Proves bit for bit that a change to distributed training did not change the numbers."""


@testbed.command()
@click.argument("case", required=False)
@click.option("--all", "run_all", is_flag=True, help="Every scenario that has this scale.")
@scale_option
@click.option("--data", type=ExistingFile, metavar="PREFIX", help="PREFIX.bin and PREFIX.idx.")
@click.option(
    "--layouts",
    metavar="all|LAYOUT;...",
    help="Each of these layouts once, without resume, against the golden.",
)
@click.option(
    "--steps", "num_steps", type=click.IntRange(min=1), help="With --layouts: only the first steps."
)
@click.option("--resume-layout", metavar="LAYOUT", help="Of the resumed run [that of the first].")
@run_options
@json_option
def run(
    case: str | None,
    run_all: bool,
    scale: str,
    data: Path | None,
    layouts: str | None,
    num_steps: int | None,
    resume_layout: str | None,
    arithmetic: "Arithmetic",
    layout: str | None,
    out: Path | None,
    master_port: int,
    timeout_s: float,
    as_json: bool,
) -> int:
    """Runs CASE (a name, S1, or a path to a model_config.yaml) and judges it by its golden.

    With --data there is no golden: only the invariants are judged. --layouts all trains in every
    layout of up to 8 ranks, one line for each, and goes on after one that fails.
    """
    from scenarios.commands import LaunchOptions, all_cases, judge_case

    if run_all == (case is not None):
        raise click.UsageError("expected either CASE or --all")
    if layouts is not None:
        if case is None or (layout, resume_layout, data) != (None, None, None):
            raise click.UsageError(
                "--layouts takes a CASE, and no --layout, no --resume-layout and no --data"
            )
        launch_options = LaunchOptions(_progress_stream(as_json), master_port, timeout_s)
        return _run_layouts(
            case, layouts, scale, arithmetic, num_steps, out, launch_options, as_json
        )
    if num_steps is not None:
        raise click.UsageError("--steps belongs to --layouts; a golden judges all steps of a run")
    outcomes: list[dict[str, Any]] = []
    for name in [case] if case is not None else all_cases(scale):
        try:
            verdict = judge_case(
                name,
                scale=scale,
                arithmetic=arithmetic,
                layout=layout,
                resume_layout=resume_layout,
                data=data,
                out=out / name if out and run_all else out,
                options=LaunchOptions(_progress_stream(as_json), master_port, timeout_s),
            )
        except (ValueError, RunFailed) as error:
            # One case that cannot run does not keep the others from being judged.
            if not run_all or (isinstance(error, RunFailed) and error.interrupted):
                raise
            code = EXIT_FAILED if isinstance(error, RunFailed) else EXIT_USAGE
            outcomes.append({"case": name, "error": {"message": str(error)}, "exit_code": code})
            _echo_error(str(error))
            continue
        outcomes.append(verdict.as_json())
        if not as_json:
            click.echo("\n".join(verdict.lines()))
    if as_json:
        _echo_json(outcomes if run_all else outcomes[0])
    return max(int(outcome["exit_code"]) for outcome in outcomes)


def _run_layouts(
    case: str,
    layouts: str,
    scale: str,
    arithmetic: "Arithmetic",
    num_steps: int | None,
    out: Path | None,
    options: Any,
    as_json: bool,
) -> int:
    from scenarios.layout_matrix import Row, judge_layouts

    def show(row: Row) -> None:
        click.echo(row.line(), err=as_json)

    matrix = judge_layouts(
        case,
        layouts,
        scale=scale,
        arithmetic=arithmetic,
        num_steps=num_steps,
        out=out,
        options=options,
        on_row=show,
    )
    if as_json:
        _echo_json(matrix.as_json())
    else:
        click.echo(matrix.summary())
    return matrix.exit_code


@testbed.command()
@click.argument("case")
@scale_option
@run_options
@json_option
@click.pass_obj
def record(
    arguments: list[str],
    case: str,
    scale: str,
    arithmetic: "Arithmetic",
    layout: str | None,
    out: Path | None,
    master_port: int,
    timeout_s: float,
    as_json: bool,
) -> int:
    """Runs CASE and records its values as the golden, if all invariants hold.

    Shows what changes against the old golden; equal values leave the file as it is.
    """
    from scenarios.commands import LaunchOptions, record_case

    recording = record_case(
        case,
        scale=scale,
        arithmetic=arithmetic,
        layout=layout,
        out=out,
        command=shlex.join(["testbed", *arguments]),
        options=LaunchOptions(_progress_stream(as_json), master_port, timeout_s),
    )
    if as_json:
        _echo_json(recording.as_json())
    else:
        click.echo("\n".join(recording.lines()))
    return recording.exit_code


@testbed.command("list")
@click.option("--names", is_flag=True, help="Only the names, one a line.")
@json_option
def list_cases(names: bool, as_json: bool) -> int:
    """Lists the scenarios: scale, layout, ranks, golden."""
    from scenarios.commands import list_rows

    rows = list_rows()
    if as_json:
        _echo_json(rows)
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
        _echo_json({"ready": ready, "conclusion": conclude(findings), "findings": facts})
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
        _echo_json(result.as_json())
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
        _echo_json(merged.as_json())
    else:
        _print_table(table(merged, num_rows))
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
        _echo_json([result.as_json() for result in results])
    else:
        _print_table(table(results))
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
    from scenarios.progress import show_bytes

    with show_bytes(_progress_stream(as_json), "tokens") as on_bytes:
        facts = build(texts, tokenizer, prefix, progress=on_bytes)
    if as_json:
        _echo_json({"prefix": str(prefix), **asdict(facts)})
    else:
        click.echo(
            f"{prefix}.bin, .idx, .json: {facts.num_documents} documents, "
            f"{facts.num_tokens} tokens, vocabulary of {facts.vocab_size}"
        )
    return EXIT_PASS


testbed.add_command(bench)
testbed.add_command(convert)


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
    line = _echo_error(message)
    if "--json" in given:
        _echo_json({"error": more or {"message": line}, "exit_code": code})
    return code


def _echo_error(message: str) -> str:
    line = " ".join(message.split())
    click.echo(f"testbed: error: {line}", err=True)
    return line


def _print_table(table: Any) -> None:
    from rich.console import Console

    console = Console()
    # A file or a pipe gets whole lines, a terminal what fits.
    (console if console.is_terminal else Console(width=240)).print(table)


def _progress_stream(as_json: bool) -> Any:
    return sys.stderr if as_json else sys.stdout


def _echo_json(document: object) -> None:
    click.echo(json.dumps(document, indent=1, allow_nan=False))
