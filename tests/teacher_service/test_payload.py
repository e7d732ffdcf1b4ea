"""How what a teacher says is cut, against plain indexing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.teacher_service import payload


@given(
    blocks=st.integers(1, 7),
    per_chunk=st.integers(1, 8),
    size=st.integers(1, 3),
    counts=st.lists(st.integers(0, 4), min_size=7, max_size=7),
)
def test_every_block_comes_out_of_its_chunk(
    blocks: int, per_chunk: int, size: int, counts: list[int]
) -> None:
    offsets = np.cumsum([0, *counts[:blocks]])
    rng = np.random.default_rng(0)
    whole = {
        "ids": np.arange(blocks * size) + 100,
        "globals": rng.random((2, blocks * size, 3)),
        "ragged/tokens": rng.random((offsets[-1], 5)),
        "offsets/tokens": offsets,
        "step/scaling": rng.random(4),
    }
    cut = payload.chunks(whole, blocks, per_chunk)
    assert all(array.flags.c_contiguous for chunk in cut for array in chunk.values())
    for index in range(blocks):
        number, at = divmod(index, per_chunk)
        in_chunk = min(per_chunk, blocks - number * per_chunk)
        ids, arrays = payload.block(cut[number], at, in_chunk)
        mine = slice(index * size, (index + 1) * size)
        assert ids is not None
        np.testing.assert_array_equal(ids, whole["ids"][mine])
        np.testing.assert_array_equal(arrays["globals"], whole["globals"][:, mine])
        np.testing.assert_array_equal(
            arrays["tokens"], whole["ragged/tokens"][offsets[index] : offsets[index + 1]]
        )
        np.testing.assert_array_equal(arrays["scaling"], whole["step/scaling"])
        assert set(arrays) == {"globals", "tokens", "scaling"}


def test_objects_are_large_or_whole_steps() -> None:
    def blocks_for(megabytes: float) -> int:
        return payload.blocks_per_chunk({"x": np.empty(int(megabytes * 2**20), np.uint8)}, 8)

    assert blocks_for(1) == 8, "a whole step"
    assert blocks_for(64) == 2, "16 MiB"
    assert blocks_for(200) == 1


def test_a_part_without_samples_says_none() -> None:
    ids, arrays = payload.block({"globals": np.zeros((2, 4, 3))}, 0, 2)
    assert ids is None
    assert arrays["globals"].shape == (2, 2, 3)
