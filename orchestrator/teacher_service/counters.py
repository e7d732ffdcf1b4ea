"""What the teacher computed, over all its actors and drivers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from orchestrator.fsio import atomic_write


@dataclass(frozen=True)
class Stats:
    """The account's figures, for metrics and the artifact."""

    images_forwarded: int
    images_needed: int
    bytes_per_image: float
    steps_recomputed: int
    teacher_restarts: int
    teacher_forwards_per_image: float


@dataclass
class TeacherCounters:
    """Counters that outlive the process that counts.

    Attributes:
        images_per_step: images, not crops.
        images_forwarded: by the teacher, every time.
        steps_recomputed: steps computed again after they had been thrown away.
        bytes_put: size of the outputs of distinct steps.
        restarts: teachers that were lost or had to move.
        coordinator_restarts: coordinators that took another one's place.
        spans: which steps were computed, as sorted [first, end) pairs: almost always one.
    """

    images_per_step: int = 0
    images_forwarded: int = 0
    steps_recomputed: int = 0
    bytes_put: int = 0
    restarts: int = 0
    coordinator_restarts: int = 0
    spans: list[list[int]] = field(default_factory=list)

    def computed(self, step: int, images: int, size: int) -> None:
        """`step` was computed with `images` forwards; its outputs have `size` bytes."""
        self.images_forwarded += images
        if any(first <= step < end for first, end in self.spans):
            self.steps_recomputed += 1
            return
        self.bytes_put += size
        merged: list[list[int]] = []
        for first, end in sorted([*self.spans, [step, step + 1]]):
            if merged and merged[-1][1] == first:
                merged[-1][1] = end
            else:
                merged.append([first, end])
        self.spans = merged

    def stats(self) -> Stats:
        """Forwards per image are 1.0 when every image went through the teacher once, however many students."""
        needed = self.images_per_step * sum(end - first for first, end in self.spans)
        return Stats(
            images_forwarded=self.images_forwarded,
            images_needed=needed,
            bytes_per_image=self.bytes_put / needed if needed else 0.0,
            steps_recomputed=self.steps_recomputed,
            teacher_restarts=self.restarts,
            teacher_forwards_per_image=self.images_forwarded / needed if needed else 0.0,
        )

    def save(self, path: Path) -> None:
        """Keep the account for a later driver."""
        # Every few seconds, by the thread that watches over the teachers: it must not wait for a disk that is busy
        # with a checkpoint. What a power cut spoils begins anew.
        atomic_write(path, json.dumps(asdict(self)), durable=False, only_writer=True)

    @staticmethod
    def load(path: Path) -> TeacherCounters:
        """The account kept at `path`; a new one if there is none or it is torn."""
        try:
            kept = json.loads(path.read_text())
            if "desk_restarts" in kept:  # its name before version 0.2
                kept["coordinator_restarts"] = kept.pop("desk_restarts")
            return TeacherCounters(**kept)
        except (OSError, ValueError, TypeError, RecursionError):
            return TeacherCounters()
