"""Blocks on their way to the device: from pinned memory, on a stream of their own, while earlier steps are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.data.blocks import Block
from orchestrator.training.device import CPU
from orchestrator.training.task import BlockTensors


@dataclass(frozen=True)
class SentBlock:
    """A block, its tensors on the device, and the event after which they are there; None on a CPU."""

    block: Block
    tensors: BlockTensors
    done: Any = None


class DeviceCopies:
    """Copies blocks to a device. On a CPU nothing is copied: tensors share their memory with the blocks' arrays.

    Args:
        device: in torch's words, such as `cuda:0`.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._stream = None if device == CPU else torch.cuda.Stream(device)

    def send(self, block: Block) -> SentBlock:
        """Begin to copy a block. Any thread may call it: it is they who copy to pinned memory, not the training."""
        if self._stream is None:
            return SentBlock(block, self._tensors(block))
        with torch.cuda.stream(self._stream):
            sent = SentBlock(block, self._tensors(block), torch.cuda.Event())
            sent.done.record(self._stream)
        return sent

    def arrived(self, sent: Sequence[SentBlock]) -> list[BlockTensors]:
        """The blocks, for work that is handed to the device from now on. The processor does not wait."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            for one in sent:
                current.wait_event(one.done)
                for tensor in one.tensors.tensors.values():
                    # Its memory must not be given to another copy before the step has used it.
                    tensor.record_stream(current)
        return [one.tensors for one in sent]

    def _tensors(self, block: Block) -> BlockTensors:
        tensors = {name: torch.from_numpy(array) for name, array in block.arrays.items()}
        if self._stream is not None:
            # torch keeps pinned memory until the copy has read it.
            tensors = {
                name: tensor.pin_memory().to(self._device, non_blocking=True)
                for name, tensor in tensors.items()
            }
        return BlockTensors(block.step, block.index, block.weight, tensors, len(block.ids))
