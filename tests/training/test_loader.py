"""Blocks loaded by several threads: the same bytes in the same order, bounded, and more threads where steps wait."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from orchestrator.data.blocks import Block, CropBlocks
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.sampler import SampleOrder
from orchestrator.data.views import CropConfig
from orchestrator.training.loader import BlockLoader


class Source:
    """Blocks that take a while; it notes what was begun, and how many at once."""

    num_blocks = 3
    parallel = True

    def __init__(self, seconds: float = 0.0, bad: tuple[int, int] | None = None) -> None:
        self.begun: list[tuple[int, int]] = []
        self.at_once = self.most_at_once = 0
        self._seconds, self._bad, self._lock = seconds, bad, threading.Lock()

    def load(self, step: int, index: int) -> Block:
        with self._lock:
            self.begun.append((step, index))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self._seconds * (1 + (step * 7 + index) % 3))
        with self._lock:
            self.at_once -= 1
        if (step, index) == self._bad:
            raise RuntimeError("a broken block")
        return Block(step, index, np.array([step, index]), {})


class Single(Source):
    parallel = False


def _places(loader: BlockLoader, start: int, stop: int) -> list[tuple[int, list[tuple[int, int]]]]:
    return [
        (step, [(block.step, block.index) for block in blocks]) for step, blocks in loader.steps(start, stop)
    ]


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (3, 1), (4, 5)])
def test_steps_and_blocks_come_in_order(threads: int, ahead: int) -> None:
    found = _places(BlockLoader(Source(0.001), [0, 2], threads, threads, ahead), 3, 12)
    assert found == [(step, [(step, 0), (step, 2)]) for step in range(3, 12)]
    assert _places(BlockLoader(Source(), [], 2, 2, 1), 0, 2) == [(0, []), (1, [])]
    assert _places(BlockLoader(Source(), [0], 2, 2, 1), 5, 5) == []


def test_nothing_is_begun_that_is_further_ahead() -> None:
    source = Source(0.001)
    for step, _ in BlockLoader(source, [0, 1, 2], 4, 4, 2).steps(0, 12):
        time.sleep(0.01)
        assert max(begun for begun, _ in source.begun) <= step + 2
    assert source.most_at_once <= 4
    assert len(source.begun) == len(set(source.begun)) == 36


def test_threads_are_added_where_steps_wait_and_only_there() -> None:
    slow, quick = Source(0.01), Source()
    waits = BlockLoader(slow, [0, 1, 2], 1, 3, 2)
    _places(waits, 0, 20)
    assert waits.num_loaders == slow.most_at_once == 3
    idle = BlockLoader(quick, [0, 1, 2], 1, 3, 2)
    for _ in idle.steps(0, 12):
        time.sleep(0.03)
    assert idle.num_loaders == quick.most_at_once == 1


def test_a_source_that_is_not_parallel_is_asked_by_one_thread_a_step_ahead() -> None:
    source = Single(0.001)
    loader = BlockLoader(source, [0, 1, 2], 4, 4, 5)
    for step, _ in loader.steps(0, 6):
        time.sleep(0.02)
        assert max(begun for begun, _ in source.begun) <= step + 1
    assert source.most_at_once == loader.num_loaders == 1


def test_an_error_comes_at_its_step_and_ends_all_threads() -> None:
    source = Source(0.001, bad=(4, 1))
    steps = BlockLoader(source, [0, 1], 3, 3, 3).steps(0, 50)
    assert [next(steps)[0] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="a broken block"):
        next(steps)
    begun = len(source.begun)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("blocks")]
    time.sleep(0.02)
    assert len(source.begun) == begun


def test_leaving_early_ends_all_threads() -> None:
    steps = BlockLoader(Source(0.001), [0, 1], 3, 3, 3).steps(0, 1000)
    next(steps)
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("blocks")]


def test_crops_have_the_same_bytes_for_any_number_of_threads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 24 photos two cannot be read; each is told once, and the same ones stand for them."""
    rng = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / f"{number:02}.jpg"
        Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(path)
        if number in (5, 17):
            path.write_bytes(path.read_bytes()[:200])
    index = ImageIndex([ImageRecord("s", f"{n:02}.jpg", str(tmp_path), "", 90, 70) for n in range(24)])
    crops = CropConfig(global_size=32, local_size=16, num_local=3)

    def loaded(threads: int, ahead: int) -> tuple[list[tuple[bytes, ...]], list[str]]:
        order = SampleOrder({"all": np.arange(24)}, batch_size=12, seed=0)
        source = CropBlocks(
            index, order, lambda step: crops, patch_size=8, block_size=4, seed=0, max_unreadable=0.2
        )
        loader = BlockLoader(source, [0, 1, 2], threads, threads, ahead)
        found = [
            (block.ids.tobytes(), *(array.tobytes() for array in block.arrays.values()))
            for _, blocks in loader.steps(0, 6)
            for block in blocks
        ]
        return found, sorted(source.pop_troubles())

    caplog.set_level(logging.CRITICAL)
    one, troubles = loaded(1, 1)
    assert len(troubles) == 2
    assert loaded(4, 3) == (one, troubles)
    assert loaded(2, 1) == (one, troubles)
    assert cv2.getNumThreads() == 1
