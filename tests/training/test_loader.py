"""Blocks loaded by threads or processes: the same bytes and order, bounded, and more loaders where steps wait."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from orchestrator.data.blocks import Block, BlockSource, CropBlocks
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.sampler import SampleOrder
from orchestrator.data.views import CropConfig
from orchestrator.errors import UserError
from orchestrator.training import loader_process
from orchestrator.training.loader import BlockLoader, _Trial
from orchestrator.training.loader_process import LoaderProcessError, ProcessBlocks


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


def _as_it_is(block: Block) -> Block:
    return block


def _places(loader: BlockLoader[Block], start: int, stop: int) -> list[tuple[int, list[tuple[int, int]]]]:
    return [
        (step, [(block.step, block.index) for block in blocks]) for step, blocks in loader.steps(start, stop)
    ]


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (3, 1), (4, 5)])
def test_steps_and_blocks_come_in_order(threads: int, ahead: int) -> None:
    found = _places(BlockLoader(Source(0.001), [0, 2], threads, threads, ahead, _as_it_is), 3, 12)
    assert found == [(step, [(step, 0), (step, 2)]) for step in range(3, 12)]
    assert _places(BlockLoader(Source(), [], 2, 2, 1, _as_it_is), 0, 2) == [(0, []), (1, [])]
    assert _places(BlockLoader(Source(), [0], 2, 2, 1, _as_it_is), 5, 5) == []


def test_nothing_is_begun_that_is_further_ahead() -> None:
    source = Source(0.001)
    for step, _ in BlockLoader(source, [0, 1, 2], 4, 4, 2, _as_it_is).steps(0, 12):
        time.sleep(0.01)
        assert max(begun for begun, _ in source.begun) <= step + 2
    assert source.most_at_once <= 4
    assert len(source.begun) == len(set(source.begun)) == 36


def test_threads_are_added_where_steps_wait_and_only_there() -> None:
    slow, quick = Source(0.01), Source()
    waits = BlockLoader(slow, [0, 1, 2], 1, 3, 2, _as_it_is)
    _places(waits, 0, 20)
    assert waits.num_loaders == slow.most_at_once == 3
    idle = BlockLoader(quick, [0, 1, 2], 1, 3, 2, _as_it_is)
    for _ in idle.steps(0, 12):
        time.sleep(0.03)
    assert idle.num_loaders == quick.most_at_once == 1


def test_a_source_that_is_not_parallel_is_asked_by_one_thread_a_step_ahead() -> None:
    source = Single(0.001)
    loader = BlockLoader(source, [0, 1, 2], 4, 4, 5, _as_it_is)
    for step, _ in loader.steps(0, 6):
        time.sleep(0.02)
        assert max(begun for begun, _ in source.begun) <= step + 1
    assert source.most_at_once == loader.num_loaders == 1


def test_an_error_comes_at_its_step_and_ends_all_threads() -> None:
    source = Source(0.001, bad=(4, 1))
    steps = BlockLoader(source, [0, 1], 3, 3, 3, _as_it_is).steps(0, 50)
    assert [next(steps)[0] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="a broken block"):
        next(steps)
    begun = len(source.begun)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("blocks")]
    time.sleep(0.02)
    assert len(source.begun) == begun


def test_leaving_early_ends_all_threads() -> None:
    steps = BlockLoader(Source(0.001), [0, 1], 3, 3, 3, _as_it_is).steps(0, 1000)
    next(steps)
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("blocks")]


@dataclass(frozen=True)
class Crops:
    """Makes a source of crops of 24 photos, of which two cannot be read; it can be pickled."""

    folder: Path
    max_unreadable: float = 0.2

    def write(self) -> None:
        rng = np.random.default_rng(0)
        for number in range(24):
            path = self.folder / f"{number:02}.jpg"
            Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(path)
            if number in (5, 17):
                path.write_bytes(path.read_bytes()[:200])

    def __call__(self) -> CropBlocks:
        rows = [ImageRecord("s", f"{n:02}.jpg", str(self.folder), "", 90, 70) for n in range(24)]
        crops = CropConfig(global_size=32, local_size=16, num_local=3)
        return CropBlocks(
            ImageIndex(rows),
            SampleOrder({"all": np.arange(24)}, batch_size=12, seed=0),
            lambda step: crops,
            patch_size=8,
            block_size=4,
            seed=0,
            max_unreadable=self.max_unreadable,
        )


@pytest.fixture
def crops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Crops:
    caplog.set_level(logging.CRITICAL)
    made = Crops(tmp_path)
    made.write()
    return made


def _bytes(
    source: BlockSource, loaders: int, ahead: int, processes: ProcessBlocks | None = None, steps: int = 6
) -> list[tuple[bytes, ...]]:
    loader = BlockLoader(source, [0, 1, 2], loaders, loaders, ahead, _as_it_is, processes=processes)
    return [
        (block.ids.tobytes(), *(array.tobytes() for array in block.arrays.values()))
        for _, blocks in loader.steps(0, steps)
        for block in blocks
    ]


def test_crops_have_the_same_bytes_for_any_number_of_threads(crops: Crops) -> None:
    """Of 24 photos two cannot be read; each is told once, and the same ones stand for them."""

    def loaded(threads: int, ahead: int) -> tuple[list[tuple[bytes, ...]], list[str]]:
        source = crops()
        return _bytes(source, threads, ahead), sorted(source.pop_troubles())

    one, troubles = loaded(1, 1)
    assert len(troubles) == 2
    assert loaded(4, 3) == (one, troubles)
    assert loaded(2, 1) == (one, troubles)
    assert cv2.getNumThreads() == 1


@pytest.mark.heavy
def test_processes_load_the_same_bytes_and_tell_the_same_troubles(crops: Crops) -> None:
    threads = crops()
    expected = _bytes(threads, 1, 1)
    with closing(ProcessBlocks(crops, 3)) as processes:
        assert _bytes(processes, 3, 2) == expected
        assert sorted(processes.pop_troubles()) == sorted(threads.pop_troubles())
        assert processes.paths([5]) == threads.paths([5])
        (first, *_) = pids = [process._process.pid for process in processes._all]
        assert len(pids) == 3
        os.kill(first, signal.SIGKILL)
        with pytest.raises(LoaderProcessError, match="ended by signal 9"):
            _bytes(processes, 3, 2)
    assert not any(_is_running(pid) for pid in pids)


@pytest.mark.heavy
def test_what_a_source_raises_in_a_process_is_raised_here(crops: Crops) -> None:
    with (
        closing(ProcessBlocks(replace(crops, max_unreadable=1 / 24), 3)) as processes,
        pytest.raises(UserError, match="2 of 24 photos cannot be read any more"),
    ):
        _bytes(processes, 1, 1)
    with (
        closing(ProcessBlocks(partial(crops, "too many arguments"), 3)) as processes,
        pytest.raises(TypeError, match="positional"),
    ):
        processes.load(0, 0)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Ready(ProcessBlocks):
    """Stands for processes that are there at once."""

    started = 0

    def start(self, count: int) -> None:
        self.started = count


@pytest.mark.parametrize(("step_s", "chosen"), [(0.5, True), (0.95, False), (2.0, False)])
def test_processes_are_tried_where_threads_do_not_suffice_and_kept_if_they_load_more(
    step_s: float, chosen: bool
) -> None:
    """Steps of a second with threads; with processes, of which every other step waits, of so many seconds."""
    threads, processes = Source(), Ready(Source, 3)
    trial = _Trial(threads, processes, ahead=2)
    step, now = 0, 0.0
    while not processes.started:
        assert trial.source is threads
        step, now = step + 1, now + 1
        trial.step_waited(step, now, 4)
    trial.wait()
    trial.step_waited(step + 1, now + 1, 4)
    assert (processes.started, trial.source) == (4, processes)
    for _ in range(20):
        step, now = step + 2, now + 2 * step_s
        trial.step_waited(step, now, 4)
    assert (trial.source is processes) == chosen


def test_processes_that_cannot_be_started_leave_threads(caplog: pytest.LogCaptureFixture) -> None:
    threads = Source()
    trial = _Trial(threads, ProcessBlocks(lambda: threads, 3), ahead=1)  # a lambda cannot be pickled
    for step in range(12):
        trial.step_waited(step, float(step), 2)
    trial.wait()
    trial.step_waited(12, 12.0, 2)
    assert trial.source is threads
    assert "processes cannot be started" in caplog.text


def test_processes_end_where_threads_load_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that loads at that moment loads its block to the end."""
    ended: list[int] = []
    loads, goes_on = threading.Event(), threading.Event()

    class One:
        def __init__(self, make: bytes) -> None:
            self.number = len(made)
            made.append(self)

        def wait_until_ready(self) -> None:
            pass

        def load(self, step: int, index: int) -> tuple[Block, list[str]]:
            loads.set()
            assert goes_on.wait(10)
            return Block(step, index, np.array([step]), {}), []

        def end(self) -> None:
            ended.append(self.number)

    made: list[One] = []
    monkeypatch.setattr(loader_process, "_Process", One)
    threads, processes = Source(), ProcessBlocks(Source, 3)
    trial = _Trial(threads, processes, ahead=1)
    for step in range(12):
        trial.step_waited(step, float(step), 3)
        trial.wait()
    assert trial.source is processes
    with ThreadPoolExecutor(1) as pool:
        block = pool.submit(processes.load, 5, 1)
        assert loads.wait(10)
        for step in range(12, 30):
            trial.step_waited(step, 2.0 * step, 3)
        trial.wait()
        assert trial.source is threads
        assert sorted(ended) == [0, 1]
        goes_on.set()
        assert block.result().step == 5
    assert sorted(ended) == [0, 1, 2]
    processes.close()
    assert len(ended) == len(made) == 3


def test_processes_that_did_start_end_where_another_one_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    class One:
        def __init__(self, make: bytes) -> None:
            self.number = len(made)
            made.append(self)

        def wait_until_ready(self) -> None:
            if self.number == 1:
                raise LoaderProcessError("no memory")

        def end(self) -> None:
            ended.append(self.number)

    made: list[One] = []
    monkeypatch.setattr(loader_process, "_Process", One)
    trial = _Trial(Source(), ProcessBlocks(Source, 3), ahead=1)
    for step in range(12):
        trial.step_waited(step, float(step), 3)
    trial.wait()
    assert ended == [0, 1, 2]
