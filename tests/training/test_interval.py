"""How often a job checkpoints."""

from __future__ import annotations

import pytest

from orchestrator.training.checkpoint.interval import checkpoint_interval, mtbf


def test_checkpoint_interval_follows_young_within_limits() -> None:
    assert checkpoint_interval(0.5, 3600.0) == pytest.approx(60.0)
    assert checkpoint_interval(1e-9, 60.0) == 2.0
    assert checkpoint_interval(60.0, 1e6) == 600.0
    assert mtbf(0.0, 0) == 3600.0
    assert mtbf(3600.0, 8) == pytest.approx(800.0), "losses seen shorten it"
