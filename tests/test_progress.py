"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

import io

import pytest

from scenarios import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_show_first_and_last_step_and_some_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter(range(0, 100, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: 100.0 + next(seconds))
    stream = io.StringIO()
    with progress.show_steps(stream, "run 1", 1, 9) as on_step:
        for step in range(1, 10):
            on_step(step, {"lm loss": 7.0 - step, "iteration-time": 0.25})
    lines = stream.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines[1:]] == [
        f"run 1: step {step}" for step in (1, 4, 7, 9)
    ]
    assert lines[1] == "run 1: step 1/9  lm loss 6.0000  0.25 s/step"
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_bar_that_reaches_the_end() -> None:
    stream = Terminal()
    with progress.show_steps(stream, "run 2", 4, 6) as on_step:
        for step in (4, 5, 6):
            on_step(step, {"lm loss": 5.0, "iteration-time": 0.5})
    assert "6/6  lm loss 5.0000  0.50 s/step" in stream.getvalue()


def test_bytes_are_shown_only_on_a_terminal() -> None:
    for stream in (io.StringIO(), Terminal()):
        with progress.show_count(stream, "tokens") as on_count:
            on_count(50, 100)
            on_count(100, 100)
        assert ("100%" in stream.getvalue()) == stream.isatty()
