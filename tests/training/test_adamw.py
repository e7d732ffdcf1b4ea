"""AdamW as ZeRO uses it: one group of parameters at a time, the others empty."""

from __future__ import annotations

import pytest
import torch

from orchestrator.training.zero_engine import _AdamW


def test_groups_stepped_one_at_a_time_are_a_step_of_all() -> None:
    torch.manual_seed(0)
    starts = [torch.randn(5) for _ in range(4)]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizer = _AdamW([{"params": [param], "lr": 0.1 * (i + 1)} for i, param in enumerate(ours)])
    reference = torch.optim.AdamW(
        [{"params": [param], "lr": 0.1 * (i + 1)} for i, param in enumerate(theirs)]
    )
    groups = optimizer.param_groups
    for _ in range(3):
        for param, other in zip(ours, theirs, strict=True):
            param.grad = torch.randn(5)
            other.grad = param.grad.clone()
        reference.step()
        for group in groups:
            group["params"] = []
        for group, param in zip(groups, ours, strict=True):
            group["params"] = [param]
            optimizer.step()
            group["params"] = []
    assert all(torch.equal(param, other) for param, other in zip(ours, theirs, strict=True))
    assert optimizer.param_groups is groups


def test_a_step_that_fails_keeps_the_groups() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = _AdamW([{"params": [param]}, {"params": []}])
    groups = optimizer.param_groups
    param.grad = torch.ones(2)
    optimizer.state[param] = {"step": None}
    with pytest.raises(Exception, match=r"."):
        optimizer.step()
    assert optimizer.param_groups is groups
