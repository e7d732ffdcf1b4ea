"""Many tensors gathered in few exchanges: each is whole again, whatever the groups."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.training.checkpoint import partition

SHAPES = {"a": 7, "b": 1, "c": 12, "d": 5, "e": 2}


@pytest.mark.parametrize(("at_once", "exchanges"), [(1000, 1), (13, 3), (1, 5)])
def test_tensors_of_all_groups_are_whole(
    monkeypatch: pytest.MonkeyPatch, at_once: int, exchanges: int
) -> None:
    whole = {name: torch.randn(size) for name, size in SHAPES.items()}
    sent: list[list[Tensor]] = []
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(partition, "_GATHERED_AT_ONCE", at_once)

    def parts(rank: int) -> dict[str, Tensor]:
        return {
            name: value[rank * -(-len(value) // 3) :][: -(-len(value) // 3)] for name, value in whole.items()
        }

    for rank in range(3):
        sent.append([])
        monkeypatch.setattr(dist, "all_gather", lambda _, padded, to=sent[-1]: to.append(padded.clone()))
        list(partition.gather_all(parts(rank), SHAPES))
    number = iter(range(len(sent[0])))

    def all_gather(rows: list[Tensor], _: Tensor) -> None:
        at = next(number)
        for rank, row in enumerate(rows):
            row.copy_(sent[rank][at])

    monkeypatch.setattr(dist, "all_gather", all_gather)
    pairs = list(partition.gather_all(parts(0), SHAPES))
    found = dict(pairs)
    assert [name for name, _ in pairs] == list(SHAPES), "each once"
    assert len(sent[0]) == exchanges
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(found[name], value), name
