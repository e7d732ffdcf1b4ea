"""Events add up to the state of a pipeline, across processes."""

from __future__ import annotations

import math
from pathlib import Path

from orchestrator.pipeline.key import KeyParts
from orchestrator.pipeline.ledger import Ledger
from orchestrator.store.local import LocalStore

ONE = KeyParts(kind="pretrain", config={"lr": 0.1})
TWO = KeyParts(kind="pretrain", config={"lr": 0.2})


def ledger(folder: Path) -> Ledger:
    return Ledger(LocalStore(folder), "toy")


def test_what_one_handle_writes_another_reads(tmp_path: Path) -> None:
    first, second = ledger(tmp_path), ledger(tmp_path)
    first.append("opened", run_id="r")
    first.append("running", stage="a", parts=ONE, run_id="x", reasons=("never ran",))
    first.append(
        "done", stage="a", parts=ONE, run_id="x", seconds=2.0, summary={"loss": math.nan, "max": math.inf}
    )
    first.append("closed", status="FINISHED")
    state = second.refresh()
    stage = state.stages["a"]
    assert (state.run_id, state.open, state.status) == ("r", False, "FINISHED")
    assert (stage.state, stage.key, stage.attempts, stage.seconds, stage.run_id) == (
        "done",
        ONE.key,
        1,
        2.0,
        "x",
    )
    assert math.isnan(stage.summary["loss"])
    assert stage.summary["max"] == math.inf
    second.append("opened", run_id="s")
    assert len(list((tmp_path / "ledger" / "toy").glob("*.json"))) == 5
    assert ledger(tmp_path).state.run_id == first.refresh().run_id == "s"


def test_attempts_and_time_add_up_for_one_key_and_start_anew_for_another(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    for event in ("running", "stopped", "running", "failed", "running"):
        book.append(event, stage="a", parts=ONE, run_id="x", seconds=1.0 if event != "running" else None)
    stage = book.state.stages["a"]
    assert (stage.state, stage.attempts, stage.seconds) == ("running", 3, 2.0)
    book.append("settled", stage="a")
    assert (stage.state, stage.key, stage.run_id) == ("stopped", ONE.key, "x")
    book.append("running", stage="a", parts=TWO, run_id="y")
    assert (stage.state, stage.key, stage.attempts, stage.seconds, stage.run_id) == (
        "running",
        TWO.key,
        1,
        0.0,
        "y",
    )


def test_a_reused_artifact_brings_its_own_key_and_no_run(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.append("running", stage="a", parts=ONE, run_id="x")
    book.append("done", stage="a", parts=ONE, run_id="x", seconds=1.0)
    book.append("done", stage="a", parts=TWO, reused=True, summary={"loss": 1.0})
    stage = book.state.stages["a"]
    assert (stage.key, stage.attempts, stage.run_id, stage.reused) == (TWO.key, 0, None, True)
