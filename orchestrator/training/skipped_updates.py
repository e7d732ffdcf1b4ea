"""Updates that were left out because a gradient was not finite: how many, which, and when they are too many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# So many steps are looked back on for each skipped update that is allowed: of those, one in a hundred may be skipped.
STEPS_PER_SKIP = 100
_SHOWN_SAMPLES = 16
_SHOWN_BLOCKS = 8
_SHOWN_SKIPS = 20


@dataclass
class Skips:
    """The skipped updates of a stage; equal on all workers, and saved in checkpoints.

    Attributes:
        total: all since the stage began.
        recent: those that count against the limit: the step, and what had the gradient.
    """

    total: int = 0
    recent: list[tuple[int, str]] = field(default_factory=list)

    def add(self, step: int, what: str, limit: int) -> bool:
        """The update of `step` was skipped, for what is in `what`; True if that is one too many.

        Too many are more than `limit` within the newest `limit` * `STEPS_PER_SKIP` steps.
        """
        first = step - limit * STEPS_PER_SKIP
        self.total += 1
        self.recent = [one for one in self.recent if one[0] > first] + [(step, what)]
        return len(self.recent) > limit

    def listed(self) -> str:
        """The recent ones, a line each."""
        lines = [f"step {step}: {what}" for step, what in self.recent[:_SHOWN_SKIPS]]
        left = len(self.recent) - len(lines)
        return "\n  ".join([*lines, f"and {left} more"] if left else lines)

    def saved(self) -> dict[str, Any]:
        """As JSON, for a checkpoint's manifest."""
        return {"total": self.total, "recent": [list(one) for one in self.recent]}

    @classmethod
    def of(cls, saved: object) -> Skips:
        """What `saved` gave; none if a checkpoint has no usable record of them, as those of earlier versions."""
        if not isinstance(saved, Mapping) or not isinstance(saved.get("total"), int):
            return cls()
        recent = saved.get("recent")
        usable = [(one[0], one[1]) for one in recent if _is_skip(one)] if isinstance(recent, list) else []
        return cls(saved["total"], usable)


def named(blocks: Mapping[int, Sequence[int]]) -> str:
    """Blocks and their samples in words: `block 3 (samples 17, 4)`; long lists are cut."""
    shown = sorted(blocks)[:_SHOWN_BLOCKS]
    parts = [f"block {index} (samples {_cut(blocks[index])})" for index in shown]
    left = len(blocks) - len(shown)
    return ", ".join([*parts, f"{left} more blocks"] if left else parts)


def _cut(ids: Iterable[int]) -> str:
    # A negative id is the complement of the row that stood for a photo that could not be read.
    rows = [str(row if row >= 0 else -1 - row) for row in ids]
    left = len(rows) - _SHOWN_SAMPLES
    return ", ".join(rows[:_SHOWN_SAMPLES]) + (f" and {left} more" if left > 0 else "")


def _is_skip(one: object) -> bool:
    return isinstance(one, list) and len(one) == 2 and isinstance(one[0], int) and isinstance(one[1], str)
