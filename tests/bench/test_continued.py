"""What `python -m bench continued` and `latency` compare: arms differ in what they say, and a rule is put back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import continued, latency
from orchestrator.inference import threads


@pytest.mark.parametrize("sizes", [continued.FULL, continued.QUICK])
def test_arms_differ_in_rate_decay_and_gram_alone(sizes: continued.Sizes) -> None:
    configs = {arm: continued.config_of(arm, Path("start"), sizes).identity() for arm in continued.ARMS}
    first = configs.pop("high rate")
    for arm, config in configs.items():
        differing = {name for name in config if config[name] != first[name]}
        assert differing <= {"gram", "optimizer"}, arm
        assert ("gram" in differing) == ("anchored" in arm), arm
    assert first["gram"] is None
    assert sizes.frozen % sizes.every == 0 or sizes.frozen < sizes.steps


def test_the_start_is_the_frozen_steps_and_a_look_half_of_those_before_it() -> None:
    line, sizes = continued._Curves(), continued.Sizes(steps=8, frozen=2, every=4)
    for step in range(1, 9):
        line.report(step, {"cls_patch_cosine": step, "patch_locality": 10 * step}, 0.0, {})
    line.looked(0, {"knn": 0.25, "seconds": 1.0})
    line.report(9, {"cls_patch_cosine": 0.0, "patch_locality": 0.0}, 0.0, {"knn": 0.5})
    assert [line.at(continued.COSINE, step, sizes) for step in (0, 4, 8)] == [1.5, 3.5, 7.5]
    assert line.at(continued.LOCALITY, 8, sizes) == 75
    assert line.curve[continued.KNN] == {0: 0.25, 9: 0.5}


def test_a_number_of_threads_is_fixed_for_a_while() -> None:
    before, rule = torch.get_num_threads(), threads.threads_for
    with latency._fixed(1):
        assert torch.get_num_threads() == 1
        assert threads.threads_for(1e15, 1) == 1
    with latency._fixed(None):
        assert threads.threads_for is rule
    assert (torch.get_num_threads(), threads.threads_for) == (before, rule)
