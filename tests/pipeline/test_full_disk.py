"""A whole run with every write to the disk failing in turn: full from then on, or cut off in the middle of it.

`test_kill.py` ends the driver before each object that is put; this goes below the store, to each call that writes.
"""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import recorded
import toys
from disk_faults import Disk, Kind
from rich.console import Console

from orchestrator.errors import UserError
from orchestrator.pipeline.console import Reporter
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan.stage_plan import resolve
from orchestrator.pipeline.run.driver import execute
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.storage.local import LocalStore

SHORT = """\
name: toy
stages:
  curate: {kind: curate, ticks: 0}
  pretrain: {kind: pretrain, needs: curate, ticks: 0}
"""
STAGES = ("curate", "pretrain")
_SAID, _BROKEN = 3, 4


class Killer(Disk):
    """Ends the process with half of the write done, as a power cut does."""

    def point(self, half: Callable[[], object] = lambda: None, *, removes: bool = False) -> None:
        self.count += 1
        if self.count == self.fail_at:
            half()
            os.kill(os.getpid(), signal.SIGKILL)


def drive(fail_at: int, kind: Kind) -> None:
    """Run the pipeline in this process: 0 or 1 as the command ends, 3 after a message, 4 after a traceback."""
    real_open = open
    disk = Killer(fail_at, kind) if kind == "crash" else Disk(fail_at, kind)
    patch = pytest.MonkeyPatch()
    try:
        disk.install(patch)
        loaded = load("toy.yaml", (), stage_type=toys.ToyStage)
        reporter = Reporter(Console(file=io.StringIO()))
        stages = resolve(loaded, lambda source, name: "same")
        code = execute(loaded, stages, reporter, open_tracking=recorded.open_recorded)
    except UserError:
        code = _SAID
    except OSError as error:
        # The command line makes a message of it (test_cli.py).
        code = _SAID if error.errno == errno.ENOSPC else _BROKEN
    except BaseException:
        code = _BROKEN
        with real_open("traceback", "w") as file:
            file.write(traceback.format_exc())
    patch.undo()
    # Whoever counts the writes of a run wants to know whether this one failed.
    Path("writes").write_text(str(disk.count))
    os._exit(code)


def forked(fail_at: int, kind: Kind) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=drive, args=(fail_at, kind))
    child.start()
    child.join(60)
    assert child.exitcode is not None, f"it hangs after write {fail_at}"
    return child.exitcode


# A run has about 340 of them.
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "every"), [("full", 17), ("crash", 17), ("once", 23)])
def test_a_run_goes_on_after_any_write_that_failed(
    write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, every: int
) -> None:
    fail_at, tried = 1, 0
    while True:
        folder = tmp_path / str(fail_at)
        folder.mkdir()
        monkeypatch.chdir(folder)
        Path("toy.yaml").write_text(SHORT)
        monkeypatch.setenv("TOY_TRACE", str(folder / "trace"))
        code = forked(fail_at, kind)
        assert code != _BROKEN, f"after write {fail_at}"
        reached = kind == "crash" and code == -signal.SIGKILL
        if not reached and int(Path("writes").read_text()) < fail_at:
            assert code == 0
            break
        assert forked(0, "once") == 0, f"goes on after write {fail_at}"
        workspace = Workspace("runs/")
        state = workspace.state("toy")
        assert {name: state.stages[name].state for name in STAGES} == dict.fromkeys(STAGES, "done")
        assert not state.open
        for name in STAGES:
            stage = state.stages[name]
            assert stage.key is not None
            assert workspace.intact(name, stage.key) is not None, f"after write {fail_at}"
        store = LocalStore("runs")
        assert not list((store.root / ".scratch").glob("*/*")), f"left in the store after write {fail_at}"
        assert [name for name in store.list() if "partial" in name] == []
        fail_at, tried = fail_at + every, tried + 1
    assert tried >= 200 // every
