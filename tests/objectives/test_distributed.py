"""Targets, loss and gradient of a step on 1, 2 and 3 gloo processes equal one process's float64 formulas."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import orchestrator

from . import naive, ranks

Results = list[dict[str, np.ndarray[Any, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of three ranks has after all steps."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(Path(orchestrator.__file__).parents[1])}
    command = [sys.executable, ranks.__file__, str(folder)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    return [dict(np.load(folder / f"rank-{rank}.npz")) for rank in range(3)]


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray[Any, Any]]:
    """The whole step in one process, by the naive formulas in float64, the batch in one piece."""
    blocks = [ranks.make_block(index, torch.float64) for index in range(len(ranks.MASKED))]
    teacher = ranks.make_prototypes(torch.float64)
    student = (teacher * 0.5).requires_grad_()
    dino_rows = torch.cat([block.teacher_VBD.flatten(0, 1) for block in blocks]) @ teacher
    ibot_rows = torch.cat([block.teacher_tokens_MD for block in blocks]) @ teacher
    num_views, num_images = ranks.NUM_VIEWS, ranks.NUM_IMAGES
    dino = naive.sinkhorn(dino_rows, ranks.TEMPERATURE).split(num_views * num_images)
    ibot = naive.sinkhorn(ibot_rows, ranks.TEMPERATURE).split(list(ranks.MASKED))
    losses: list[Tensor] = []
    expected: dict[Any, Any] = {}
    for index, block in enumerate(blocks):
        targets = dino[index].unflatten(0, (num_views, num_images))
        losses.append(
            naive.dino(block.student_VBD @ student, targets, skip_same=True)
            + naive.ibot(
                block.student_tokens_MD @ student, ibot[index], block.crop_of_M, num_views * num_images
            )
            + 0.1 * naive.koleo(block.student_VBD[0] @ (student @ student.T))
            + 2 * naive.gram(block.student_patches_BPD @ student, block.teacher_patches_BPD)
        )
        expected |= {f"dino_{index}": targets.numpy(), f"ibot_{index}": ibot[index].numpy()}
    loss = torch.stack(losses).mean()
    (gradient,) = torch.autograd.grad(loss, student)
    return expected | {"loss": loss.detach().numpy(), "gradient": gradient.numpy()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("split", ranks.SPLITS)
def test_ranks_equal_one_process(
    results: Results, alone: dict[str, np.ndarray[Any, Any]], split: str, dtype: torch.dtype
) -> None:
    shares = ranks.SPLITS[split]
    precision = 1e-10 if dtype == torch.float64 else 2e-5
    for rank, own in enumerate(shares):
        names = [f"{kind}_{index}" for kind in ("dino", "ibot") for index in own] + ["loss", "gradient"]
        for name in names:
            got = results[rank][f"{split}/{dtype}/{name}"]
            np.testing.assert_allclose(got, alone[name], rtol=precision, atol=precision, err_msg=name)
    # Every rank has the same bits, so that ranks never drift apart.
    for name in ("dino_v", "ibot_v", "loss", "gradient"):
        values = [results[rank][f"{split}/{dtype}/{name}"] for rank in range(len(shares))]
        assert all(np.array_equal(value, values[0]) for value in values), name
