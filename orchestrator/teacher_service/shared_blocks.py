"""A student's end of the teacher service: a `BlockSource` whose blocks come from the teachers' outputs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from orchestrator.data.blocks import Block, BlockSource, with_unreadable
from orchestrator.errors import UserError
from orchestrator.teacher_service.actor_client import ActorClient
from orchestrator.teacher_service.coordinator import StepRefs
from orchestrator.teacher_service.payload import TEACHER, StepOutputs, block

_FETCH_S = 60.0
# The loop loads one step ahead, and both steps' chunks may be wanted at once.
_HELD_STEPS = 2


class SharedBlocks:
    """Blocks cut from the chunks of each step, which all workers on a node read from the same memory. Thread-safe.

    The coordinator and the teachers may die at any time: what is missing is asked for again.

    Args:
        coordinator: name of the :class:`StepCoordinator`.
        student: the name this student is known by there.
        num_blocks: blocks of a step.
        patience_s: how long the service may be away.
        parts: which parts of a step this student reads; the first one names the samples.
        own: where the arrays come from that no part has.
        offset: the teachers' step at the student's step 0.
    """

    def __init__(
        self,
        coordinator: str,
        student: str,
        num_blocks: int,
        patience_s: float = 300.0,
        parts: Sequence[str] = (TEACHER,),
        own: BlockSource | None = None,
        offset: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self._client = ActorClient(coordinator, patience_s)
        self._student, self._parts, self._own, self._offset = student, tuple(parts), own, offset
        self._held: deque[_Step] = deque(maxlen=_HELD_STEPS)
        self._one = threading.Lock()

    def load(self, step: int, index: int) -> Block:
        """The block `index` of `step`; waits for a teacher. Its arrays are read-only and keep the step in memory.

        Raises:
            UserError: the teacher met something that the user has to mend.
            RuntimeError: the teacher failed, the service was away for too long, or this source was closed.
        """
        ids = None
        arrays: dict[str, Any] = {}
        for part in self._parts:
            chunk, at, size = self._chunk(step + self._offset, part, index)
            samples, found = block(chunk, at, size)
            ids = samples if ids is None else ids
            arrays |= found
        assert ids is not None, f"none of {self._parts} says which samples they are"
        made = with_unreadable(Block(step, index, ids, arrays), arrays.pop("unreadable", None))
        if self._own is not None:
            own = self._own.load(step + self._offset, index)
            arrays |= own.arrays
            made = with_unreadable(made, own.unreadable)
        return made

    def close(self) -> None:
        """Nobody wants these blocks any more: a thread that waits for one comes back with an error."""
        self._client.closed.set()

    def _chunk(self, step: int, part: str, index: int) -> tuple[StepOutputs, int, int]:
        """The chunk that holds a block, the block's place in it, and how many blocks it has."""
        # Two blocks of a step that are asked for at once cost one question and one transfer.
        with self._one:
            held = next((held for held in self._held if held.step == step), None)
            if held is None:
                held = _Step(step, self._next_step(step, None))
                self._held.append(held)
            per_chunk = held.there.per_chunk[part]
            number, at = divmod(index, per_chunk)
            if (part, number) not in held.chunks:
                held.chunks[part, number] = self._fetch(held, part, number)
        return held.chunks[part, number], at, min(per_chunk, self.num_blocks - number * per_chunk)

    def _fetch(self, held: _Step, part: str, number: int) -> StepOutputs:
        import ray

        while True:
            ref = held.there.refs[part][number]
            try:
                chunk: StepOutputs = self._client.get(ref, _FETCH_S)
                return chunk
            except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError):
                # It went with its node or its owner, or cannot be had from there.
                held.there = self._next_step(held.step, ref.hex())

    def _next_step(self, step: int, lost: str | None) -> StepRefs:
        while True:
            try:
                answer = self._client.call("step", self._student, step, lost)
            except RuntimeError as error:
                raise RuntimeError(f"step {step} is not available: {error}") from error
            if answer.get("mistake") is not None:
                what, where, hint = answer["mistake"]
                raise UserError(what, where=where, hint=hint)
            if "error" in answer:
                raise RuntimeError(answer["error"])
            if "there" in answer:
                there: StepRefs = answer["there"]
                return there


class _Step:
    """What is known and held of one step."""

    def __init__(self, step: int, there: StepRefs) -> None:
        self.step, self.there = step, there
        self.chunks: dict[tuple[str, int], Any] = {}
