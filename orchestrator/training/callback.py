"""What the training loop tells whoever runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class TrainerCallback(Protocol):
    """What the training loop tells the controller, and asks it.

    Nothing here waits, except for `recorded` to become true in its time.
    """

    def phase(self, name: str) -> None:
        """A part of the start, or an export, is done: it goes on."""

    def report(
        self, step: int, metrics: dict[str, float], stall_s: float, held_out: Mapping[str, float]
    ) -> None:
        """Hand over the metrics of the step that took the count to `step`, and what a checkpoint held it up.

        `held_out` are metrics of held-out photos by name; there are none after a step at which nobody looked at them.
        """

    def looked(self, step: int, held_out: Mapping[str, float]) -> None:
        """Hand over metrics of photos that are not trained on, before the first step; later ones come with `report`."""

    def recorded(self, step: int) -> bool:
        """Whether the driver has written down the metrics of all steps up to `step`."""

    def saved(self, step: int, metrics: dict[str, float]) -> None:
        """The checkpoint after `step` is committed."""

    def trouble(self, what: str) -> None:
        """Something went wrong that does not stop the training."""

    def stop_requested(self) -> bool:
        """Whether the group is to checkpoint and end."""
