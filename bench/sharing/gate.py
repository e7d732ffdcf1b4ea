"""A teacher that waits after the first steps until all students of an arm have done them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from orchestrator.stages.distill.task import FrozenTeacher

WARM_UP = 4
_POLL_S = 0.02


class GatedTeacher(FrozenTeacher):
    """Says the steps from `WARM_UP` on once the file `go` is there; all else as the real one.

    Without it a student whose group forms first would be done before the others have begun.
    """

    def __init__(self, go: Path, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._go = go

    def __call__(self, step: int) -> dict[str, dict[str, NDArray[Any]]]:
        """The parts of a step."""
        while step >= WARM_UP and not self._go.exists():
            time.sleep(_POLL_S)
        return super().__call__(step)
