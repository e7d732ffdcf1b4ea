"""A training loop without a controller: what it reports is heard by nobody, or by who says so."""

from __future__ import annotations

from collections.abc import Mapping


class Silent:
    """A `TrainerCallback` that nobody listens to; benches override what they want to hear."""

    def phase(self, name: str) -> None: ...

    def report(
        self, step: int, figures: dict[str, float], stall_s: float, held_out: Mapping[str, float]
    ) -> None: ...

    def looked(self, step: int, held_out: Mapping[str, float]) -> None: ...

    def recorded(self, step: int) -> bool:
        return True

    def saved(self, step: int, figures: dict[str, float]) -> None: ...

    def trouble(self, what: str) -> None:
        raise RuntimeError(what)

    def stop_requested(self) -> bool:
        return False
