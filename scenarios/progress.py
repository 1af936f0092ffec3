"""Shows a run's steps: a bar on a terminal, now and then a plain line elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from scenarios.golden import Value
from scenarios.launch import OnStep

LINE_EVERY_S = 5.0


@contextmanager
def show_steps(stream: TextIO, label: str, first_step: int, last_step: int) -> Iterator[OnStep]:
    """Gives a callback for the steps of one run.

    Args:
        stream: where to write; a bar is drawn if it is a terminal.
        label: name of the run.
        first_step: the first step this run trains.
        last_step: the step at which it ends.
    """
    if stream.isatty():
        with _bar(stream, label, first_step, last_step) as on_step:
            yield on_step
        return
    last_line = 0.0

    def write_line(step: int, metrics: dict[str, Value]) -> None:
        nonlocal last_line
        now = time.monotonic()
        if step in (first_step, last_step) or now - last_line >= LINE_EVERY_S:
            last_line = now
            stream.write(f"{label}: step {step}/{last_step}  {_describe(metrics)}\n")
            stream.flush()

    stream.write(f"{label}: starting ranks\n")
    stream.flush()
    yield write_line


@contextmanager
def show_count(stream: TextIO, label: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a callback (done, in all); a bar on a terminal, else nothing is shown."""
    if not stream.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=stream)) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _bar(stream: TextIO, label: str, first_step: int, last_step: int) -> Iterator[OnStep]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[numbers]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(file=stream)) as progress:
        task = progress.add_task(
            label, total=last_step, completed=first_step - 1, numbers="starting ranks"
        )

        def move(step: int, metrics: dict[str, Value]) -> None:
            progress.update(task, completed=step, numbers=_describe(metrics))

        yield move


def _describe(metrics: dict[str, Value]) -> str:
    parts = []
    loss = metrics.get("lm loss")
    if isinstance(loss, float):
        parts.append(f"lm loss {loss:.4f}")
    step_time_s = metrics.get("iteration-time")
    if isinstance(step_time_s, float):
        parts.append(f"{step_time_s:.2f} s/step")
    return "  ".join(parts)
