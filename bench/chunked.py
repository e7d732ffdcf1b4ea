"""Chunked cross-entropy holds at least 3 times less memory at its peak than whole logits do, at 32,768 prototypes.

One head's part of a step, on 768 rows: Sinkhorn-Knopp on the teacher's logits, targets, the student's loss, and the
gradients of its codes and prototypes. Each repetition of an arm is a process of its own; what it holds is its
highest resident memory (on a GPU what torch has allocated) less that before the step, when codes and prototypes are
there. Losses and gradients of both arms are the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median
from typing import Any

from bench.harness import Claim, UnfairError, interleave, require_same_losses, summarize

_ROWS, _PROTOTYPES, _BOTTLENECK = 768, 32_768, 384
_CHUNKS = (64, 128, 256)
_BEST = f"chunks of {_CHUNKS[0]}"
_GOAL = 3.0


def run(quick: bool) -> Claim:
    """One repetition of each arm, five in the full run."""
    found: dict[str, list[dict[str, Any]]] = {}

    def arm(name: str, chunk_rows: int | None) -> float:
        record = _measure(chunk_rows, steps=2 if quick else 4)
        found.setdefault(name, []).append(record)
        return float(record["peak_bytes"]) / 1e6

    arms = {"whole logits": None} | {f"chunks of {rows}": rows for rows in _CHUNKS}
    peaks = interleave(
        {name: lambda name=name, rows=rows: arm(name, rows) for name, rows in arms.items()},  # type: ignore[misc]
        1 if quick else 5,
    )
    require_same_losses(
        {name: [record["loss"] for record in records] for name, records in found.items()}, 1e-5
    )
    require_same_losses(
        {name: [record["norm"] for record in records] for name, records in found.items()}, 1e-5
    )
    seconds = {name: summarize([record["seconds"] for record in records]) for name, records in found.items()}
    gradient_mb = 4e-6 * _PROTOTYPES * _BOTTLENECK
    plain, ours = "whole logits", _BEST
    return Claim(
        claim=f"memory of a head's step with whole logits over that in chunks of {_CHUNKS[0]} rows, "
        f"{_ROWS} rows and {_PROTOTYPES:,} prototypes",
        figure=peaks[plain].median / peaks[ours].median,
        unit="times",
        goal=_GOAL,
        limit=peaks[plain].median / gradient_mb,
        arms={f"{name}, MB": peak for name, peak in peaks.items()}
        | {f"{name}, seconds": measured for name, measured in seconds.items()},
        notes=(
            "; ".join(
                f"{name}: {seconds[name].median / seconds[plain].median:.2f} of the time, "
                f"{peaks[plain].median / peaks[name].median:.1f} times less memory"
                for name in arms
                if name != plain
            ),
            f"the limit: nothing but the prototypes' own gradient, {gradient_mb:.0f} MB",
            f"measured on {found[plain][0]['device']}; losses equal to "
            f"{_spread([records[0]['loss'] for records in found.values()]):.1e}, norms of gradients to "
            f"{_spread([records[0]['norm'] for records in found.values()]):.1e}",
        ),
        better="more",
    )


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / abs(median(values))


def _measure(chunk_rows: int | None, steps: int) -> dict[str, Any]:
    spec = {
        "rows": _ROWS, "prototypes": _PROTOTYPES, "bottleneck": _BOTTLENECK, "chunk_rows": chunk_rows, "steps": steps,
    }  # fmt: skip
    command = [sys.executable, "-m", "bench._head", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UnfairError(f"an arm failed:\n{done.stderr[-2000:]}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record
