"""A checkpoint every 30 s takes at most 1 % of training time: ours beside not saving, waiting for it, and torch's own.

Two workers train a ViT-S with ZeRO-3, EMA included: 346 MB a checkpoint. The arms take turns in one group of
processes, in windows of the same number of steps with one save in each. What an arm loses is its window's wall
time less that of the same round's window without a save, over 30 s; the same window without a save, taken again,
shows how much of that is noise. The figure is what noise does not reach: the time training stood still. Beside it
stands the same with the processor time of hashing and writing, which workers on GPUs do not miss and workers on as
many cores do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness import Arm, Claim, UnfairError, summarize

_EVERY_S = 30.0
_WORLD = 2
_PATIENCE_S = 3600.0


def run(quick: bool) -> Claim:
    """One window of each arm a round; in the full run a window is the 30 s between two saves."""
    from bench._saves import AGAIN, BEHIND, NEVER, TORCH, WAITING

    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DISK")) as folder:
        spec = {"folder": folder, "world": _WORLD, "model": "vit_s"}
        spec |= {"window_s": 8.0, "rounds": 2} if quick else {"window_s": _EVERY_S, "rounds": 5}
        found = _measure(Path(folder), spec)
    rounds: list[dict[str, dict[str, float]]] = found["rounds"]
    arms = {arm: _lost(rounds, arm, NEVER) for arm in (AGAIN, BEHIND, WAITING, TORCH)}
    stalls = [one[BEHIND]["stall_s"] for one in rounds]
    lost = [one[BEHIND]["stall_s"] + one[BEHIND]["cpu_s"] for one in rounds]
    arms["ours, stall"] = summarize([stall / _EVERY_S for stall in stalls])
    arms["ours, stall and processor"] = summarize([seconds / _EVERY_S for seconds in lost])
    plain = [one[NEVER]["wall_s"] for one in rounds]
    return Claim(
        claim="share of training time that stands still for a checkpoint every 30 s",
        figure=arms["ours, stall"].median,
        unit="fraction",
        goal=0.01,
        limit=None,
        arms=arms,
        notes=(
            f"{found['steps']} steps a window, {median(plain):.1f} s without a save "
            f"({min(plain):.1f} to {max(plain):.1f})",
            f"{found['bytes'] / 1e6:.0f} MB a worker; copied in {median(stalls):.3f} s, "
            f"the first time in {found['first']['stall_s']:.3f} s; "
            f"written in {median(one[BEHIND]['write_s'] for one in rounds):.2f} s behind training's back",
            "all but the last two arms are differences of wall times; torch's files have no checksums",
        ),
    )


def _lost(rounds: list[dict[str, dict[str, float]]], arm: str, never: str) -> Arm:
    return summarize([(one[arm]["wall_s"] - one[never]["wall_s"]) / _EVERY_S for one in rounds])


def _measure(folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "bench._saves", str(folder / "spec.json")]
    logs = [folder / f"log-{rank}" for rank in range(_WORLD)]
    workers = []
    for rank, log in enumerate(logs):
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(_WORLD)}
        with log.open("w") as out:
            workers.append(subprocess.Popen([*command, str(rank)], stdout=out, stderr=out, env=env))
    try:
        codes = [worker.wait(_PATIENCE_S) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    if any(codes):
        raise UnfairError("a worker failed:\n" + "\n".join(log.read_text()[-2000:] for log in logs))
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result
