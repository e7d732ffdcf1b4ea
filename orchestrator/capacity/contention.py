"""How long a step takes whose processes share too few cores: the teacher service, played through. Pure arithmetic.

Nobody's work is random here: a student that is quicker than the teacher starts when the teacher is done, and a
teacher that is ahead starts when the slowest student has moved. Who is ready at the same time follows from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Of a core: what Ray's daemons, slots, coordinator and driver take in a stage (docs/sharing-scale.md, measured).
AROUND_CORES = 0.14
# How far teachers may be ahead of what the slowest student asks for, as by default; more changes nothing here, as
# every step takes a part the same time.
_WINDOW = 4
# The second half counts, when everybody waits for the same one in every step.
_WINDOWS_PLAYED = 16


@dataclass(frozen=True)
class Busy:
    """So many equal processes, each with so many seconds of its own to compute in a step."""

    seconds: float
    processes: int = 1


def least_s(parts: Mapping[str, Busy], cores: float) -> float:
    """Seconds that no step can do without: of the largest part, and of all work over the cores that are left for it."""
    work_s = sum(part.seconds * part.processes for part in parts.values())
    return max(max(part.seconds for part in parts.values()), work_s / _left(cores))


def shared_s(teacher: Busy, actors: int, students: Mapping[str, Busy], cores: float) -> float:
    """Seconds of a step in which all that have something to do share the cores evenly.

    Longer than `least_s`: cores idle when few are ready, and the largest part is slowed down when many are.

    Args:
        teacher: of one actor, which takes all its seconds for a step.
        actors: each at a step of its own.
        students: by name.
        cores: that they share; what is around them takes `AROUND_CORES` of those.
    """
    parts, window = list(students.values()), max(_WINDOW, actors + 1)
    steps = _WINDOWS_PLAYED * window
    at, learning = [0] * len(parts), [0.0] * len(parts)
    teaching: dict[int, float] = {}
    handed_out, now_s, half_s = 0, 0.0, 0.0
    while (slowest := min(at)) < steps:
        for number, part in enumerate(parts):
            if not learning[number] and at[number] < handed_out and at[number] not in teaching:
                learning[number] = part.seconds
        # A worker asks for the next step as soon as it has this one.
        asked = min(step + (seconds > 0) for step, seconds in zip(at, learning, strict=True))
        while len(teaching) < actors and handed_out < asked + window:
            teaching[handed_out] = teacher.seconds
            handed_out += 1
        ready = teacher.processes * len(teaching)
        ready += sum(part.processes for part, seconds in zip(parts, learning, strict=True) if seconds)
        first_s = min([*teaching.values(), *(seconds for seconds in learning if seconds)])
        now_s += first_s / min(1.0, _left(cores) / ready)
        teaching = {step: seconds - first_s for step, seconds in teaching.items() if seconds > first_s}
        for number, seconds in enumerate(learning):
            if seconds:
                learning[number] = max(0.0, seconds - first_s)
                at[number] += not learning[number]
        if slowest < steps // 2 <= min(at):
            half_s = now_s
    return (now_s - half_s) / (steps - steps // 2)


def _left(cores: float) -> float:
    """Of a share of a core there may be less than what is around takes; it does not take more than half."""
    return max(cores - AROUND_CORES, cores / 2)
