"""A rank forked with all tests collected: runs those it is told to, and reports to the parent."""

import base64
import faulthandler
import os
import pickle
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest

from primitives.lockstep import SESSION
from primitives.lockstep.session import RankSession
from primitives.rendezvous import RankInfo


class ForkedRank(RankSession):
    """The plugin of one forked rank; rank 0's reports are the ones of all ranks."""

    def on_merged(self, report: pytest.TestReport) -> None:
        if self.info.rank == 0:
            config = self.item.config
            fields = config.hook.pytest_report_to_serializable(config=config, report=report)
            self.member.link.send({"report": fields})

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, nodeid: str, location: Any
    ) -> None:
        if self.info.rank == 0:
            seen = warning_message
            packed = pickle.dumps((str(seen.message), seen.category, seen.filename, seen.lineno))
            text = base64.b64encode(packed).decode()
            self.member.link.send({"warning": text, "nodeid": nodeid, "location": location})

    def run(self, session: pytest.Session) -> None:
        """Runs one test after another until the parent has no more."""
        while "run" in (command := self.member.commands.get()):
            item = session.items[command["run"]]
            next_item = session.items[command["next"]] if command["next"] is not None else None
            try:
                item.ihook.pytest_runtest_protocol(item=item, nextitem=next_item)
            except pytest.exit.Exception as error:
                self.member.link.send({"exit": error.msg})
                return
            self.member.link.send({"done": command["run"]})
        capture: Any = session.config.pluginmanager.get_plugin("capturemanager")
        capture.resume_global_capture()  # as in any other phase
        try:
            session._setupstate.teardown_exact(None)
        except (Exception, pytest.fail.Exception) as error:
            shown = pytest.ExceptionInfo.from_exception(error).getrepr(style="short")
            self.member.link.send({"late": str(shown)})
        capture.suspend_global_capture(in_=True)
        self.close_groups()
        self.member.link.send({"bye": True})


def be_rank(session: pytest.Session, num_ranks: int, rank: int, address: str) -> None:
    """The life of a forked rank.

    Args:
        session: of pytest, with all tests collected and none run.
        num_ranks: how many ranks there are.
        rank: this one.
        address: where the parent listens.
    """
    config = session.config
    descriptors = capture_anew(config)
    faulthandler.enable(file=descriptors[1])
    config.get_terminal_writer()._file = open(os.devnull, "w")  # noqa: SIM115 (the parent speaks)
    folder = config._tmp_path_factory.getbasetemp() / f"rank_{rank}"  # type: ignore[attr-defined]
    folder.mkdir(exist_ok=True)
    config._tmp_path_factory._basetemp = folder  # type: ignore[attr-defined]
    plugin = ForkedRank(config, RankInfo(rank, num_ranks, rank, f"fork/{os.getppid()}"), address)
    plugin.member.link.send({"pid": os.getpid(), "output": descriptors})
    config.pluginmanager.register(plugin, SESSION)
    try:
        plugin.start_watch()
        plugin.open_store()
        plugin.run(session)
    except BaseException:
        os.write(descriptors[1], traceback.format_exc().encode())  # the parent shows it
        raise


def capture_anew(config: pytest.Config) -> tuple[int, int]:
    """Gives this process captured output of its own instead of the parent's.

    Returns:
        Descriptors of stdout and stderr as they are while a test is captured.
    """
    capture: Any = config.pluginmanager.get_plugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()
    descriptors = os.dup(1), os.dup(2)
    capture.suspend_global_capture(in_=True)
    return descriptors


def output_of(pid: int, descriptor: int) -> Any:
    """What another process captures, opened apart: reading does not move its own position."""
    return open(Path(f"/proc/{pid}/fd/{descriptor}"), errors="replace")


def unpack_warning(text: str) -> warnings.WarningMessage:
    message, category, filename, lineno = pickle.loads(base64.b64decode(text))
    return warnings.WarningMessage(category(message), category, filename, lineno)
