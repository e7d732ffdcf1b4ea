"""One arm of `bench/chunked.py`: `python -m bench._head SPEC` measures a head's steps and prints a JSON line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import stopwatch
from orchestrator.objectives.chunked import SoftTargets, chunked_cross_entropy, chunked_sinkhorn_scaling
from orchestrator.objectives.dino import cross_entropy
from orchestrator.objectives.sinkhorn import sinkhorn_scaling, targets
from orchestrator.training.device import device_type

_STUDENT_TEMPERATURE, _TEACHER_TEMPERATURE = 0.1, 0.07


class Head:
    """Codes and prototypes of a student and a teacher."""

    def __init__(self, rows: int, prototypes: int, bottleneck: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(count: int) -> Tensor:
            return torch.randn(count, bottleneck, generator=generator)

        self.codes = F.normalize(drawn(rows), dim=-1).to(device).requires_grad_()
        self.teacher_codes = F.normalize(drawn(rows), dim=-1).to(device)
        self.prototypes = drawn(prototypes).div_(bottleneck**0.5).to(device).requires_grad_()
        self.teacher_prototypes = drawn(prototypes).div_(bottleneck**0.5).to(device)

    def step(self, chunk_rows: int | None) -> Tensor:
        """The loss; its gradients are left in `codes` and `prototypes`."""
        self.codes.grad = self.prototypes.grad = None
        loss = self._plain() if chunk_rows is None else self._chunked(chunk_rows)
        loss.backward()
        return loss.detach()

    def _plain(self) -> Tensor:
        logits_NK = self.teacher_codes @ self.teacher_prototypes.T
        log_v_K = sinkhorn_scaling(logits_NK, _TEACHER_TEMPERATURE)
        wanted_NK = targets(logits_NK, _TEACHER_TEMPERATURE, log_v_K)
        return cross_entropy(self.codes @ self.prototypes.T, wanted_NK, _STUDENT_TEMPERATURE).mean()

    def _chunked(self, chunk_rows: int) -> Tensor:
        log_v_K = chunked_sinkhorn_scaling(
            self.teacher_codes, self.teacher_prototypes, _TEACHER_TEMPERATURE, chunk_rows=chunk_rows
        )
        wanted = SoftTargets(self.teacher_codes[None], self.teacher_prototypes, log_v_K, _TEACHER_TEMPERATURE)
        loss, _ = chunked_cross_entropy(
            self.codes[None],
            self.prototypes,
            wanted,
            [[1.0]],
            self.codes.new_ones(1, 1) / len(self.codes),
            temperature=_STUDENT_TEMPERATURE,
            chunk_rows=chunk_rows,
        )
        return loss


def _resident(key: str) -> int:
    """Bytes: `VmRSS` now, `VmHWM` at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Peak of the first step, median time of the others, and what both arms must agree on."""
    device = device_type()
    cuda = device != "cpu"
    # Libraries make their own buffers when they are first used.
    Head(4, 64, spec["bottleneck"], device).step(2 if spec["chunk_rows"] else None)
    head = Head(spec["rows"], spec["prototypes"], spec["bottleneck"], device)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else _resident("VmRSS")
    losses, seconds = [], []
    for step in range(1 + spec["steps"]):
        with stopwatch() as elapsed:
            losses.append(head.step(spec["chunk_rows"]).item())
        if step == 0:
            peak = (torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")) - before
        else:
            seconds.append(elapsed())
    assert head.codes.grad is not None
    assert head.prototypes.grad is not None
    return {
        "peak_bytes": peak,
        "seconds": median(seconds),
        "loss": losses[-1],
        "norm": float(head.codes.grad.norm() + head.prototypes.grad.norm()),
        "device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads",
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.loads(sys.argv[1]))) + "\n")
