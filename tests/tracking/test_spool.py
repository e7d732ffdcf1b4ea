from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.tracking.spool import Spool, clean_name


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def test_a_step_counts_once_a_channel_with_its_first_values(spool: Spool) -> None:
    assert spool.append("run", 1, {"loss": 2.0}, time_ms=7)
    assert not spool.append("run", 1, {"loss": 3.0})
    assert spool.append("run", 1, {"knn": 0.5}, channel="eval")
    assert spool.append("other", 1, {"loss": 9.0})
    assert spool.history("run", "train") == [
        {"step": 1, "time_ms": 7, "channel": "train", "metrics": {"loss": 2.0}}
    ]
    assert [record["channel"] for record in spool.history("run")] == ["train", "eval"]
    assert spool.history("unknown") == []


def test_replayed_steps_are_known_to_the_next_process(spool: Spool) -> None:
    for step in range(5):
        spool.append("run", step, {"loss": step})
    later = pickle.loads(pickle.dumps(spool))
    assert [later.append("run", step, {"loss": -1}) for step in range(3, 7)] == [False, False, True, True]
    assert not spool.append("run", 6, {"loss": -2}), "what another process wrote counts too"
    assert [record["metrics"]["loss"] for record in spool.history("run")] == [0, 1, 2, 3, 4, -1, -1]


def test_a_torn_last_line_is_dropped_and_the_step_can_be_written_again(spool: Spool) -> None:
    spool.append("run", 1, {"loss": 1.0})
    whole = spool.size("run")
    spool.append("run", 2, {"loss": 2.0})
    with spool.path("run").open("r+b") as file:
        file.truncate(spool.size("run") - 5)

    later = Spool(spool.folder)
    assert [step for (step,) in _steps(later)] == [1]
    assert later.read("run", whole) == []
    assert later.append("run", 2, {"loss": 3.0})
    assert _steps(later) == [(1,), (2,)]


def test_a_damaged_line_costs_only_itself(spool: Spool) -> None:
    for step in range(3):
        spool.append("run", step, {"loss": 1.0})
    lines = spool.path("run").read_bytes().splitlines(keepends=True)
    spool.path("run").write_bytes(lines[0] + b"\xff" * (len(lines[1]) - 1) + b"\n" + lines[2])
    assert _steps(Spool(spool.folder)) == [(0,), (2,)]


def test_two_processes_at_once_record_each_step_once(spool: Spool) -> None:
    code = (
        "from pathlib import Path; from orchestrator.tracking.spool import Spool\n"
        f"spool = Spool(Path({str(spool.folder)!r}))\n"
        "print(sum(spool.append('run', step, {'loss': 1.0}) for step in range(500)))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    recorded = [int(process.communicate()[0]) for process in processes]
    assert sum(recorded) == 500
    assert sorted(_steps(spool)) == [(step,) for step in range(500)]


def test_infinite_and_missing_numbers_survive(spool: Spool) -> None:
    spool.append("run", 0, {"a": math.inf, "b": math.nan})
    metrics = spool.history("run")[0]["metrics"]
    assert metrics["a"] == math.inf
    assert math.isnan(metrics["b"])


def test_names_are_made_fit_for_mlflow() -> None:
    assert clean_name("loss/dino (v2)%é") == "loss/dino _v2___"
    assert len(clean_name("x" * 1000)) == 250


def test_run_ids_are_no_paths(spool: Spool) -> None:
    with pytest.raises(ValueError, match="not a run id"):
        spool.append("../x", 0, {})


def _steps(spool: Spool) -> list[tuple[int]]:
    return [(record["step"],) for record in spool.history("run")]
