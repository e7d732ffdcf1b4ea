"""How often to checkpoint, from what a checkpoint costs and how often machines go. Times are seconds."""

from __future__ import annotations

import math

# One loss in the first hour of a job is what is believed before anything was seen.
PRIOR_MTBF_S = 3600.0
MIN_INTERVAL_S, MAX_INTERVAL_S = 2.0, 600.0


def mtbf(elapsed_s: float, losses: int) -> float:
    """Mean time between failures of a group: what was seen, and one loss in `PRIOR_MTBF_S` before it."""
    return (PRIOR_MTBF_S + elapsed_s) / (1 + losses)


def checkpoint_interval(cost_s: float, mtbf_s: float) -> float:
    """Seconds between checkpoints that lose least time: √(2·cost·MTBF) (Young, CACM 17(9), 1974), within limits."""
    return min(MAX_INTERVAL_S, max(MIN_INTERVAL_S, math.sqrt(2.0 * cost_s * mtbf_s)))
