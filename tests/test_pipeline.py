"""The 1F1B schedule: complete, in order, bounded in memory, and never a deadlock."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from scenarios.parallel.mesh import Stage
from scenarios.parallel.pipeline import Task, one_f_one_b

STAGES, MICROBATCHES = st.integers(1, 9), st.integers(1, 20)


def schedules(num_stages: int, num_microbatches: int) -> list[list[Task]]:
    return [[*one_f_one_b(Stage(i, num_stages), num_microbatches)] for i in range(num_stages)]


def runs_to_the_end(tasks_of_stages: list[list[Task]]) -> bool:
    """Plays the stages with sends that never wait and receives in order that do."""
    last = len(tasks_of_stages) - 1
    todo = [deque(tasks) for tasks in tasks_of_stages]
    # (kind, stage that receives) -> microbatches under way
    arrived: dict[tuple[str, int], deque[int]] = {}
    moved = True
    while moved:
        moved = False
        for stage, tasks in enumerate(todo):
            if not tasks:
                continue
            kind, i = tasks[0]
            from_peer = stage > 0 if kind == "forward" else stage < last
            if from_peer:
                inbox = arrived.get((kind, stage), deque())
                if not inbox:
                    continue
                if inbox.popleft() != i:
                    return False
            tasks.popleft()
            peer = stage + 1 if kind == "forward" else stage - 1
            arrived.setdefault((kind, peer), deque()).append(i)
            moved = True
    return not any(todo)


@given(STAGES, MICROBATCHES)
def test_every_stage_does_everything_once_in_order(stages: int, microbatches: int) -> None:
    for index, tasks in enumerate(schedules(stages, microbatches)):
        for kind in ("forward", "backward"):
            assert [i for k, i in tasks if k == kind] == [*range(microbatches)]
        running = most = 0
        for kind, _ in tasks:
            running += 1 if kind == "forward" else -1
            assert running >= 0
            most = max(most, running)
        assert most == min(stages - index, microbatches)


@given(STAGES, MICROBATCHES)
def test_no_deadlock_and_messages_arrive_in_order(stages: int, microbatches: int) -> None:
    assert runs_to_the_end(schedules(stages, microbatches))


def test_the_player_sees_a_deadlock() -> None:
    """Two stages that both wait for the other."""
    right = schedules(2, 2)
    assert not runs_to_the_end([[("backward", 0), ("forward", 0)], right[1]])
    assert not runs_to_the_end([[*reversed(right[0])], right[1]])
