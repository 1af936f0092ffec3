"""``testbed run`` and ``testbed record``."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from scenarios.failures import RunFailed
from scenarios.terminal import (
    EXIT_FAILED,
    EXIT_USAGE,
    echo_error,
    echo_json,
    json_option,
    progress_stream,
)

if TYPE_CHECKING:
    from scenarios.schema import Arithmetic

Command = TypeVar("Command", bound=Callable[..., Any])
ExistingFile = click.Path(path_type=Path)

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
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu",
                     show_default=True,
                     help="cuda: train on GPUs, which ranks may share; the same golden."),
        click.option("--layout", metavar="LAYOUT", help="Like dp2 instead of the case's own."),
        click.option("--out", type=ExistingFile, help="New or empty folder [runs/CASE-TIME]."),
        click.option("--master-port", type=click.IntRange(0, 65535), default=0,
                     help="Port of the rendezvous [a free one]."),
        click.option("--timeout", "timeout_s", type=click.FloatRange(min=1), default=300.0,
                     show_default=True, help="Hang limit: seconds without a step."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("case", required=False)
@click.option("--all", "run_all", is_flag=True, help="Every scenario that has this scale.")
@scale_option
@click.option("--data", type=ExistingFile, metavar="PREFIX", help="PREFIX.bin and PREFIX.idx.")
@click.option(
    "--layouts",
    metavar="all|pairs|LAYOUT[>OTHER];...",
    help="Each of these once against the golden; LAYOUT>OTHER resumes in OTHER.",
)
@click.option(
    "--steps",
    "num_steps",
    type=click.IntRange(min=1),
    help="Only the first steps, without resume unless its layout is given.",
)
@click.option(
    "--no-golden", is_flag=True, help="Judge only what must hold without one: a case not recorded."
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
    no_golden: bool,
    resume_layout: str | None,
    arithmetic: "Arithmetic",
    device: str,
    layout: str | None,
    out: Path | None,
    master_port: int,
    timeout_s: float,
    as_json: bool,
) -> int:
    """Runs CASE (a name, S1, or a path to a model_config.yaml) and judges it by its golden.

    With --data there is no golden: only the invariants are judged. --layouts all trains in every
    layout of up to 8 ranks, one line for each, and goes on after one that fails; --layouts pairs
    resumes twelve of them in other ones.
    """
    from scenarios.commands import LaunchOptions, all_cases, judge_case

    if run_all == (case is not None):
        raise click.UsageError("expected either CASE or --all")
    if layouts is not None:
        if case is None or no_golden or (layout, resume_layout, data) != (None, None, None):
            raise click.UsageError(
                "--layouts takes a CASE with a golden, and no --layout, --resume-layout or --data"
            )
        launch_options = LaunchOptions(progress_stream(as_json), master_port, timeout_s, device)
        return _run_layouts(
            case, layouts, scale, arithmetic, num_steps, out, launch_options, as_json
        )
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
                num_steps=num_steps,
                with_golden=not no_golden,
                out=out / name if out and run_all else out,
                options=LaunchOptions(progress_stream(as_json), master_port, timeout_s, device),
            )
        except (ValueError, RunFailed) as error:
            # One case that cannot run does not keep the others from being judged.
            if not run_all or (isinstance(error, RunFailed) and error.interrupted):
                raise
            code = EXIT_FAILED if isinstance(error, RunFailed) else EXIT_USAGE
            outcomes.append({"case": name, "error": {"message": str(error)}, "exit_code": code})
            echo_error(str(error))
            continue
        outcomes.append(verdict.as_json())
        if not as_json:
            click.echo("\n".join(verdict.lines()))
    if as_json:
        echo_json(outcomes if run_all else outcomes[0])
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
        echo_json(matrix.as_json())
    else:
        click.echo(matrix.summary())
    return matrix.exit_code


@click.command()
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
    device: str,
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
        options=LaunchOptions(progress_stream(as_json), master_port, timeout_s, device),
    )
    if as_json:
        echo_json(recording.as_json())
    else:
        click.echo("\n".join(recording.lines()))
    return recording.exit_code
