"""How many of torch's threads a forward pass on a CPU is worth."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn

from orchestrator.models.configs import ConvNeXtConfig, ViTConfig
from orchestrator.models.cost import forward_flops

# A forward is 100 to 200 parallel regions, at whose end all threads wait for the last one. Where other programs use
# the cores, one of the threads is always without a core, so a region costs milliseconds, however little it computes.
# Measured on two busy cores (10 to 20 programs wanted them), medians, one thread against two: vit_nano on one picture
# of 64 pixels (0.18 GFLOP) 16 ms against 295 ms, on 64 of them (11.6 GFLOP) 1.1 s against 5.5 s; vit_s on one of 224
# pixels (9.4 GFLOP) 0.6 s against 4.3 s. The price, 4 s there, hardly grows with the work. So small work gets one
# thread, and loses a fraction of a second on an idle machine; what takes seconds gets more, and loses at most as much
# again.
FLOPS_PER_THREAD = 2e10


def threads_for(flops: float, most: int) -> int:
    """The number of threads for a forward pass: one for each :data:`FLOPS_PER_THREAD`, at least 1, at most `most`."""
    return max(1, min(most, int(flops / FLOPS_PER_THREAD)))


def flops_of(model: nn.Module, num_images: int, size: int) -> float | None:
    """Operations of a forward pass on square images of `size` pixels a side; None of a model of another kind."""
    config = getattr(model, "config", None)
    if not isinstance(config, (ViTConfig, ConvNeXtConfig)):
        return None
    return float(num_images * forward_flops(config, size, size))


class _Limit:
    """A number of torch's threads that holds for some blocks of code, and what was set before them.

    torch keeps the number for the process and once more for each thread, so threads that embed side by side must not
    take each other's number for the user's: the first one in remembers what was set, and all of them set it again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._before = 0, 0

    @contextlib.contextmanager
    def __call__(self, flops: float | None) -> Iterator[None]:
        """Within the block torch has as many threads as `flops` are worth; None: as many as the user set."""
        with self._lock:
            if self._inside == 0:
                self._before = torch.get_num_threads()
            self._inside += 1
            before = self._before
        wanted = before if flops is None else threads_for(flops, before)
        try:
            if wanted != before:
                torch.set_num_threads(wanted)
            yield
        finally:
            if wanted != before:
                torch.set_num_threads(before)
            with self._lock:
                self._inside -= 1


fitting_threads = _Limit()
