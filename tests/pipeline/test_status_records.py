"""`status` and records that say less, or other things, than this version writes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.pipeline.maintenance import status
from orchestrator.pipeline.maintenance.status import _attempts, _goodput, _newest, _ray_train
from orchestrator.pipeline.store.ledger import StageState
from orchestrator.tracking.spool import Spool

WHOLE = {"name": "toy/a", "status": "RUNNING", "workers": "1-2", "num_attempts": 1, "attempts": "[]"}


@pytest.mark.parametrize("lacking", [None, *WHOLE])
def test_a_run_that_says_too_little_is_not_shown(tmp_path: Path, lacking: str | None) -> None:
    spool = Spool(tmp_path)
    spool.post("r", "open", name="a", parent=None)
    tags = {f"ray_train.{name}": value for name, value in WHOLE.items() if name != lacking}
    spool.post("r", "tags", tags=tags)
    assert len(_ray_train(spool, StageState("a", run_id="r"))) == (lacking is None)


@pytest.mark.parametrize("driven", [True, False])
def test_without_a_driver_no_run_is_running(tmp_path: Path, driven: bool) -> None:
    spool, output = Spool(tmp_path), io.StringIO()
    attempts = [
        {"status": "ERRORED", "workers": 1, "failed_ranks": [0]},
        {"status": "RUNNING", "workers": 2, "failed_ranks": []},
    ]
    for run_id, run_status in (("r", "RUNNING"), ("s", "FINISHED")):
        spool.post(run_id, "open", name="a", parent=None)
        tags = WHOLE | {"status": run_status, "attempts": json.dumps(attempts)}
        spool.post(run_id, "tags", tags={f"ray_train.{name}": value for name, value in tags.items()})
    stages = [StageState("a", run_id="r"), StageState("b", run_id="s")]
    status._print_runs(Console(file=output, width=200), spool, stages, driven=driven)
    said = output.getvalue()
    assert ("RUNNING" in said) == driven
    assert ("BROKEN OFF, 2 workers" in said) != driven
    assert "FINISHED" in said


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("garbage", 0),
        ("{}", 0),
        ("[7, {}]", 0),
        ('[{"status": "x", "workers": 1, "failed_ranks": []}, {"status": "y", "failed_ranks": 7}]', 1),
    ],
)
def test_attempts(text: str, count: int) -> None:
    assert len(_attempts(text)) == count


def test_goodput_without_all_causes(tmp_path: Path) -> None:
    spool, metrics = Spool(tmp_path), dict[str, Any](goodput=0.5)
    spool.append("r", 1, metrics, channel="goodput")
    assert _goodput(spool, StageState("a", run_id="r")) == ""


def test_the_newest_loss_is_that_of_training(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append("r", 20, {"loss": 6.0}, 1, channel="train")
    spool.append("r", 20, {"loss": 7.5}, 2, channel="val")
    spool.append("r", 160, {"images_forwarded": 160.0}, 3, channel="sharing")
    spool.append("r", 1, {"driver_checkpoint_bytes_read": 9.0}, 4, channel="io")
    assert _newest(spool, "r") == "step 20: loss 6"


def test_one_worker_is_singular() -> None:
    assert [status._workers(count) for count in (1, "1", 2)] == ["1 worker", "1 worker", "2 workers"]
