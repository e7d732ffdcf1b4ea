"""Blocks on their way to a device: as they are on a CPU; on a GPU, which is stood for, in the right order of events."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.data.blocks import Block
from orchestrator.training.device_copies import DeviceCopies


def _block(index: int) -> Block:
    return Block(3, index, np.array([index]), {"pixels": np.full((2, 3), index, np.uint8)}, weight=0.5)


def test_on_a_cpu_tensors_are_the_blocks_arrays() -> None:
    copies = DeviceCopies("cpu")
    blocks = [_block(0), _block(1)]
    (first, second) = copies.arrived([copies.send(block) for block in blocks])
    assert (first.step, first.index, first.weight, first.num_samples) == (3, 0, 0.5, 1)
    assert second.tensors["pixels"].tolist() == [[1, 1, 1], [1, 1, 1]]
    blocks[1].arrays["pixels"][:] = 7
    assert second.tensors["pixels"].unique().tolist() == [7]


def test_on_a_gpu_pinned_memory_is_copied_on_a_stream_that_steps_wait_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    happened: list[Any] = []

    class Stream:
        def __init__(self, device: str) -> None:
            self.device = device

        def wait_event(self, event: Event) -> None:
            happened.append("wait")

    class Event:
        def record(self, stream: Stream) -> None:
            happened.append(("record", stream.device))

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        happened.append("side stream")
        yield
        happened.append("back")

    def moved(tensor: torch.Tensor, device: str, *, non_blocking: bool) -> torch.Tensor:
        happened.append(("copy", device, non_blocking))
        return tensor

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: happened.append("pin") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: happened.append("used"))
    copies = DeviceCopies("cuda:0")
    sent = copies.send(_block(4))
    assert happened == ["side stream", "pin", ("copy", "cuda:0", True), ("record", "cuda:0"), "back"]
    happened.clear()
    (there,) = copies.arrived([sent])
    assert happened == ["wait", "used"]
    assert there.tensors["pixels"].unique().tolist() == [4]
