"""A student's end of the share service: a `BlockSource` whose blocks come from the teacher's bundles."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import numpy as np

from orchestrator.data.blocks import Block
from orchestrator.sharing.service import Bundle

logger = logging.getLogger("orchestrator")

NAMESPACE = "orchestrator"

_ASK_S = 10.0
_FETCH_S = 60.0
_FIRST_DELAY_S, _LAST_DELAY_S = 0.1, 2.0
_SLICE_S = 0.5


class SharedBlocks:
    """Blocks cut from the bundle of each step, which every worker on a node reads zero-copy. Thread-safe.

    A bundle holds arrays by name: those that start with `step/` belong to the whole step and go to every block
    as they are; `ragged/NAME` are rows of all blocks on end, cut at `offsets/NAME` (num_blocks + 1,); every
    other array has its batch on axis 1 and is cut into equal parts. `ids` (batch,) are the samples.

    The actor may die at any time and comes back under its name, on another machine and without what it had
    computed: what is missing is asked for again.

    Args:
        service: name of the `ShareActor`.
        student: the name this student is known by there.
        num_blocks: blocks of a step.
        patience_s: how long the service may be away.
    """

    def __init__(self, service: str, student: str, num_blocks: int, patience_s: float = 300.0) -> None:
        self.num_blocks = num_blocks
        self._service, self._student, self._patience_s = service, student, patience_s
        self._actor: Any = None
        self._held: tuple[int, Bundle] | None = None
        self._one = threading.Lock()
        self._closed = threading.Event()

    def load(self, step: int, index: int) -> Block:
        """The block `index` of `step`; waits for the teacher.

        Raises:
            RuntimeError: the teacher failed, the service was away for too long, or this source was closed.
        """
        # Two blocks of a step that are asked for at once cost one question and one transfer.
        with self._one:
            if self._held is None or self._held[0] != step:
                self._held = None
                self._held = (step, self._ask(step))
            bundle = self._held[1]
        return _cut(bundle, step, index, self.num_blocks)

    def close(self) -> None:
        """Nobody wants these blocks any more: a thread that waits for one comes back with an error."""
        self._closed.set()

    def _ask(self, step: int) -> Bundle:
        import ray

        heard, delay = time.monotonic(), _FIRST_DELAY_S
        ref = None
        while not self._closed.is_set():
            try:
                lost, ref = ref, None
                answer = self._get(self._find().step.remote(self._student, step, lost), _ASK_S)
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                if "ref" in answer:
                    (ref,) = answer["ref"]
                    bundle: Bundle = self._get(ref, _FETCH_S)
                    return bundle
                heard, delay = time.monotonic(), _FIRST_DELAY_S
                continue
            except (ray.exceptions.RayError, LookupError) as error:
                self._bear(error, step, time.monotonic() - heard)
                ref = ref.hex() if isinstance(error, ray.exceptions.ObjectLostError) and ref else None
            self._closed.wait(delay)
            delay = min(_LAST_DELAY_S, 2 * delay)
        raise RuntimeError("this source of blocks is closed")

    def _bear(self, error: Exception, step: int, away_s: float) -> None:
        lines = str(error).strip().splitlines() or [""]
        what = f"{type(error).__name__}: {lines[0]}"
        if away_s > self._patience_s:
            text = f"the share service has been away for {away_s:.0f} s, so step {step} cannot be had: {what}"
            raise RuntimeError(text) from error
        logger.info("the share service is away: %s", what)
        self._actor = None

    def _find(self) -> Any:
        import ray

        if self._actor is None:
            try:
                self._actor = ray.get_actor(self._service, NAMESPACE)
            except ValueError as error:
                raise LookupError("it has no actor now") from error
        return self._actor

    def _get(self, ref: Any, limit_s: float) -> Any:
        """The value of `ref`, looking now and then whether anybody still wants it."""
        import ray

        until = time.monotonic() + limit_s
        while True:
            if self._closed.is_set():
                raise RuntimeError("this source of blocks is closed")
            ready, _ = ray.wait([ref], timeout=_SLICE_S)
            if ready or time.monotonic() > until:
                return ray.get(ref, timeout=0 if not ready else limit_s)


def _cut(bundle: Bundle, step: int, index: int, num_blocks: int) -> Block:
    arrays = {}
    for name, array in bundle.items():
        kind, _, rest = name.partition("/")
        if kind == "step":
            arrays[rest] = array.copy()
        elif kind == "ragged":
            first, last = bundle[f"offsets/{rest}"][index : index + 2]
            arrays[rest] = array[first:last].copy()
        elif kind != "offsets" and name != "ids":
            arrays[name] = _part(array, index, num_blocks)
    return Block(step, index, _part(bundle["ids"][None], index, num_blocks)[0], arrays)


def _part(array: Any, index: int, num_blocks: int) -> Any:
    size = array.shape[1] // num_blocks
    return np.array(array[:, index * size : (index + 1) * size])
