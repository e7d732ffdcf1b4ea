"""`elastic.exact`: the same bits at any number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import CONFIG, RunJob
from .test_chunks import saved

# Seven blocks: neither two nor three workers divide them, and 1/7 is not a power of two. The learning rate is high,
# so that a bit that differs somewhere moves others.
STEPS = 8
CLIP_NORM = 0.5
CONFIGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunked": {"chunk_rows": 5},
    "clipped": {"optimizer": {"lr": {"peak": 5e-3, "warmup_steps": 1}, "clip_norm": CLIP_NORM}},
}
COMMON = {
    "steps": STEPS,
    "batch_size": 28,
    "frozen_prototype_steps": 0,
    "optimizer": {**CONFIG["optimizer"], "lr": {"peak": 5e-3, "warmup_steps": 1}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_moments_and_ema_are_bit_for_bit_the_same(run_job: RunJob, tmp_path: Path, name: str) -> None:
    config = {**COMMON, **CONFIGS[name]}
    alone = run_job(tmp_path / "alone", 1, config=config, exact=True)
    theirs = saved(tmp_path / "alone" / f"checkpoints/step-{STEPS:08d}")
    for world in (2, 3):
        got = run_job(tmp_path / f"at-{world}", world, config=config, exact=True)
        for (_, metrics), (step, wanted) in zip(got["metrics"], alone["metrics"], strict=True):
            for key in ("loss", "koleo", "grad_norm", "grad_norm_backbone"):
                assert metrics[key] == pytest.approx(wanted[key], rel=1e-13), (world, step, key)
        ours = saved(tmp_path / f"at-{world}" / f"checkpoints/step-{STEPS:08d}")
        assert ours.keys() == theirs.keys()
        for tensor, value in theirs.items():
            np.testing.assert_array_equal(ours[tensor], value, err_msg=f"{world} {tensor}")

    if name == "clipped":
        assert any(metrics["grad_norm_backbone"] > CLIP_NORM for _, metrics in alone["metrics"])
        # A mean of gradients is not longer than the longest of them.
        mean = [value for tensor, value in theirs.items() if tensor.startswith("exp_avg/backbone.")]
        assert 0 < np.linalg.norm(np.concatenate(mean)) <= CLIP_NORM, "nothing was clipped"


def test_without_it_they_differ_in_their_last_bits(run_job: RunJob, tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    for world in (1, 3):
        run_job(tmp_path / f"at-{world}", world, config=COMMON)
    ours, theirs = (saved(tmp_path / f"at-{world}" / f"checkpoints/step-{STEPS:08d}") for world in (3, 1))
    assert any((ours[tensor] != value).any() for tensor, value in theirs.items())
