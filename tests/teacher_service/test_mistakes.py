"""What a teacher meets that the user has to mend reaches the students as that, not as a crash to try again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from orchestrator.errors import UserError
from orchestrator.teacher_service.coordinator import StepCoordinator
from orchestrator.teacher_service.counters import TeacherCounters
from orchestrator.teacher_service.shared_blocks import SharedBlocks
from orchestrator.teacher_service.teacher_actor import TeacherActor


def test_a_mistake_of_the_user_passes_the_desk() -> None:
    asyncio.run(_pass_the_coordinator())


async def _pass_the_coordinator() -> None:
    coordinator = StepCoordinator({"a": 0}, 4, window=2, patience_s=60.0, account=TeacherCounters())
    told: list[tuple[Any, ...]] = []

    def make() -> Any:
        raise UserError("9 photos cannot be read", where="photos", hint="put them back")

    class Teachers:
        def call(self, method: str, *arguments: Any) -> None:
            assert method == "fail"
            told.append(arguments)

    actor: Any = TeacherActor("t", "coordinator", make, 2, 1.0)
    actor._coordinator = Teachers()
    actor._compute(0, None)
    waiting = asyncio.ensure_future(coordinator.step("a", 0))
    await asyncio.sleep(0)
    await coordinator.fail(*told[0])
    answer = await waiting

    class Students:
        def call(self, *arguments: Any) -> dict[str, Any]:
            return answer

    blocks: Any = SharedBlocks("coordinator", "a", 2)
    blocks._client = Students()
    with pytest.raises(UserError, match="9 photos cannot be read") as raised:
        blocks.load(0, 0)
    assert (raised.value.where, raised.value.hint) == ("photos", "put them back")
