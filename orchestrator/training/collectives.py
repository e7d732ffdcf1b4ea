"""What all workers of a step do together: sums, and rows that go round a ring. Needs a process group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


class AllWorkers:
    """The workers of the default process group (see `task.Workers`)."""

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact

    def __call__(self, tensor: Tensor) -> Tensor:
        """The sum over workers, in place."""
        if dist.get_world_size() > 1:
            dist.all_reduce(tensor)
        return tensor

    def ring(self, rows: Tensor) -> Iterator[Tensor]:
        """Every worker's rows in turn, the own ones first.

        Each worker hands on to the next what came from the one before, so no more than two workers' rows are
        held at a time; they travel while the caller computes. To be used up by every worker.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        counts = self._counts(rows)
        current = rows.contiguous()
        for turn in range(world):
            arriving: list[dist.Work] = []
            if turn < world - 1:
                source = (rank - turn - 1) % world
                following = torch.empty(
                    (counts[source], *rows.shape[1:]), dtype=rows.dtype, device=rows.device
                )
                transfers = [
                    dist.P2POp(operation, tensor, peer % world)
                    for operation, tensor, peer in (
                        (dist.isend, current, rank + 1),
                        (dist.irecv, following, rank - 1),
                    )
                    # Both ends know the counts: nothing is sent where there is nothing.
                    if len(tensor)
                ]
                arriving = dist.batch_isend_irecv(transfers) if transfers else []
            yield current
            for transfer in arriving:
                transfer.wait()
            if turn < world - 1:
                current = following

    def _counts(self, rows: Tensor) -> list[int]:
        counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
        counts[dist.get_rank()] = len(rows)
        return [int(count) for count in self(counts).tolist()]
