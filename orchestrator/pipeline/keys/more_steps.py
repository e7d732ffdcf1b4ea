"""What of a stage has more steps than when it was made, and what is said of it: it goes on, or starts over."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.pipeline.keys.cache_key import KeyParts

# Of a field in a stage's config.
FieldPath = tuple[str, ...]
# By the field that says a number of steps: the fields whose values depend on it.
TiedToSteps = Mapping[FieldPath, tuple[str, ...]]


def grown(known: KeyParts, new: KeyParts, tied: TiedToSteps) -> dict[FieldPath, int]:
    """Which numbers of steps have grown, with what they were; none if anything else differs, or one has shrunk.

    Args:
        known: what was made before.
        new: the stage as it is now.
        tied: see :meth:`Stage.tied_to_steps`. A number that is null is what `steps` says.
    """
    found: dict[FieldPath, int] = {}
    config = copy.deepcopy(known.config)
    for path in tied:
        before, now = (_at(one, path) or one.get("steps") for one in (known.config, new.config))
        if not (isinstance(now, int) and isinstance(before, int) and before <= now):
            return {}
        if before < now:
            found[path] = before
    for path in dict.fromkeys([("steps",), *tied]):
        section = _at(config, path[:-1])
        if not isinstance(section, dict):
            return {}
        section[path[-1]] = _at(new.config, path)
    same = known.model_copy(update={"config": config}).key == new.key
    return found if same else {}


def told(longer: Mapping[FieldPath, int], tied: TiedToSteps) -> tuple[str, bool]:
    """What becomes of the parts of a stage that have more steps, and whether any of them goes on.

    Args:
        longer: see :func:`grown`.
        tied: see :meth:`Stage.tied_to_steps`.
    """
    over = [path for path in longer if tied[path]]
    by_step: dict[int, list[FieldPath]] = {}
    for path, step in longer.items():
        if path not in over:
            by_step.setdefault(step, []).append(path)
    all_at_once = not over and len(by_step) == 1
    said = [
        f"goes on from step {step}" if all_at_once else f"{_names(paths, 'go', 'goes')} on from step {step}"
        for step, paths in by_step.items()
    ]
    if over:
        fields = list(dict.fromkeys(field for path in over for field in tied[path]))
        why = f"{', '.join(fields)} {'depends' if len(fields) == 1 else 'depend'} on the number of steps"
        said.append(f"{_names(over, 'start', 'starts')} over: {why}" if by_step else f"starts over: {why}")
    return "; ".join(said), bool(by_step)


def _names(paths: Sequence[FieldPath], several: str, one: str) -> str:
    """The parts whose numbers of steps these are, and the verb that fits."""
    return f"{', '.join('.'.join(path[1:-1]) for path in paths)} {one if len(paths) == 1 else several}"


def _at(config: Any, path: FieldPath) -> Any:
    for part in path:
        config = config.get(part) if isinstance(config, Mapping) else None
    return config
