"""`Model.features` takes little longer than with the better of one thread and all of them, for one picture and for 32.

The threads that the product chooses follow from the work (`orchestrator/inference/threads.py`), since on a busy machine
torch's own number can make a picture many times slower. Each arm computes the same forward passes in turn with the
others; what is compared is the median of each.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator
from time import perf_counter

from bench.harness import Arm, Claim, summarize

CASES = {
    ("vit_nano", 64): (1, 32),
    ("convnext_mini", 64): (1, 32),
    ("vit_s", 224): (1, 32),
}
QUICK = {("vit_nano", 64): (1,)}
CHOSEN = "chosen"


def run(quick: bool, repetitions: int = 5) -> Claim:
    """Time all cases.

    Args:
        quick: one case, twice.
        repetitions: of each arm.
    """
    from orchestrator.models import build

    arms: dict[str, Arm] = {}
    notes: list[str] = []
    worst = 0.0
    times = 2 if quick else repetitions
    for (name, size), batches in (QUICK if quick else CASES).items():
        net = build(name).eval()
        for batch in batches:
            found = _times(net, size, batch, times)
            middle = {arm: statistics.median(values) for arm, values in found.items()}
            best = min(value for arm, value in middle.items() if arm != CHOSEN)
            worst = max(worst, middle[CHOSEN] / best)
            case = f"{name}, {batch} × {size} px"
            arms |= {
                f"{case}, {arm}": summarize([1e3 * one for one in values]) for arm, values in found.items()
            }
            notes.append(f"{case}: {middle[CHOSEN] / best:.2f} times the better of the others")
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    notes.append(f"arms in ms; {os.cpu_count()} cores, load of the last 1, 5 and 15 minutes: {load}")
    return Claim(
        claim="features take little longer than with the better number of threads",
        figure=worst,
        unit="times the better of one thread and all, the worst case",
        goal=2.0,
        limit=1.0,
        arms=arms,
        notes=notes,
    )


def _times(net: object, size: int, batch: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each repetition by arm, interleaved."""
    import numpy as np
    import torch

    from orchestrator.inference.forward import features_of

    most = torch.get_num_threads()
    squares = list(np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8))

    def timed(threads: int | None) -> float:
        with _fixed(threads):
            began = perf_counter()
            features_of(net, squares)  # type: ignore[arg-type]
            return perf_counter() - began

    ways: dict[str, Callable[[], float]] = {CHOSEN: lambda: timed(None), "1 thread": lambda: timed(1)}
    if most > 1:
        ways[f"{most} threads"] = lambda: timed(most)
    for way in ways.values():
        way()
    found: dict[str, list[float]] = {arm: [] for arm in ways}
    for _ in range(repetitions):
        for arm, way in ways.items():
            found[arm].append(way())
    return found


@contextlib.contextmanager
def _fixed(threads: int | None) -> Iterator[None]:
    """So many of torch's threads whatever the work is; None leaves the choice to the product."""
    import torch

    from orchestrator.inference import threads as module

    if threads is None:
        yield
        return
    before, rule = torch.get_num_threads(), module.threads_for
    module.threads_for = lambda flops, most: most
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        module.threads_for = rule
        torch.set_num_threads(before)
