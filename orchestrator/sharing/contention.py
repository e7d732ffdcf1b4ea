"""How long a step takes whose processes share too few cores. Pure arithmetic, like the planner's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Of a core: what Ray's daemons, seats, desk and driver take while a stage runs (docs/sharing-scale.md, measured).
AROUND_CORES = 0.14
_ROUNDS = 40


@dataclass(frozen=True)
class Busy:
    """So many equal processes, each with so many seconds of its own to compute in a step."""

    seconds: float
    processes: int = 1


def least_s(parts: Mapping[str, Busy], cores: float) -> float:
    """Seconds that no step can do without: of the largest part, and of all work over the cores that are left for it."""
    work_s = sum(part.seconds * part.processes for part in parts.values())
    # Of a share of a core there may be less than what is around takes; it does not take more than half.
    left = max(cores - AROUND_CORES, cores / 2)
    return max(max(part.seconds for part in parts.values()), work_s / left)


def contended_s(parts: Mapping[str, Busy], cores: float) -> float:
    """Seconds of a step in which every process does its part, and those that are ready share the cores evenly.

    A process is ready for the share of the step that its part takes it, at times that have nothing to do with the
    others'. While `ready` of them are, each runs at min(1, cores / ready) of its speed; the step lasts as long as
    the one that gets done last. That is longer than `least_s`: cores idle when few are ready, and the largest part
    is slowed down when many are.

    Args:
        parts: by name; only their sizes count.
        cores: that they share; what is around them takes `AROUND_CORES` of those.
    """
    at_least = least_s(parts, cores)
    step_s, slowed = at_least, dict.fromkeys(parts, 1.0)
    for _ in range(_ROUNDS):
        ready = {name: min(1.0, part.seconds * slowed[name] / step_s) for name, part in parts.items()}
        slowed = {name: 1 / _speed(_others(parts, ready, name), cores) for name in parts}
        longest_s = max(part.seconds * slowed[name] for name, part in parts.items())
        # Half way: a longer step has fewer ready at once, and so would make the next guess too short.
        step_s = (step_s + max(at_least, longest_s)) / 2
    return step_s


def _others(parts: Mapping[str, Busy], ready: Mapping[str, float], name: str) -> list[float]:
    """Probabilities that 0, 1, … processes are ready beside one of `name`."""
    chances = [1.0]
    for other, part in parts.items():
        p = ready[other]
        for _ in range(part.processes - (other == name)):
            stay = [chance * (1 - p) for chance in chances] + [0.0]
            come = [0.0] + [chance * p for chance in chances]
            chances = [a + b for a, b in zip(stay, come, strict=True)]
    return chances


def _speed(others: list[float], cores: float) -> float:
    """Of a process that is ready, in the mean: 1 where there is a core for everybody."""
    return sum(chance * min(1.0, cores / (1 + number + AROUND_CORES)) for number, chance in enumerate(others))
