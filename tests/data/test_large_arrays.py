"""Arrays of rows in memory and in files: the same numbers, and nothing left behind."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data import large_arrays
from orchestrator.data.large_arrays import empty, pieces, stacked, taken


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache's folder, with every array in a file and pieces of three rows."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(large_arrays, "_SMALL", 0)
    monkeypatch.setattr(large_arrays, "_PIECE", 3 * 4 * 5)
    return tmp_path / "cache"


def is_mapped(array: Any) -> bool:
    """Whether its memory is that of a file."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    return array is not None


def test_a_large_array_is_in_a_file_without_a_name(in_files: Path) -> None:
    array = empty((40, 5), np.float32)
    assert is_mapped(array)
    assert type(array) is np.ndarray
    array[:] = np.arange(200).reshape(40, 5)
    np.testing.assert_array_equal(array, np.arange(200).reshape(40, 5))
    assert list(in_files.iterdir()) == []


def test_a_small_array_is_in_memory() -> None:
    assert not is_mapped(empty((40, 5), np.float32))


def test_what_the_disk_has_no_room_for_is_in_memory_with_a_warning(
    in_files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    for _ in range(2):
        array = empty((40, 5), np.uint8)
        assert not is_mapped(array)
        assert array.shape == (40, 5)
    said = f"large features are kept in memory, and not in files: {in_files} cannot be used: No space left on device"
    assert caplog.messages == [said]


def test_a_part_of_the_disk_is_left_free_for_others(
    in_files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(large_arrays, "space", lambda folder: (700, 10_000))
    assert is_mapped(empty((40, 5), np.uint8))
    assert caplog.messages == []
    assert not is_mapped(empty((41, 5), np.uint8))
    assert caplog.messages == [
        f"large features are kept in memory, and not in files: the disk of {in_files} would have less than 5% free"
    ]


def test_pieces_are_all_rows_in_their_order(in_files: Path) -> None:
    rows = np.zeros((10, 5), np.float32)
    assert [np.arange(10)[piece].tolist() for piece in pieces(rows)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert [piece.stop for piece in pieces(np.zeros((2, 1000)))] == [1, 2]
    assert list(pieces(np.zeros((0, 5)))) == []


def test_rows_are_those_that_numpy_takes(in_files: Path) -> None:
    array = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    rows = np.array([4, 4, 19, 0, 7, 3, 11])
    found = taken(array, rows)
    assert is_mapped(found)
    np.testing.assert_array_equal(found, array[rows])


def test_parts_are_laid_after_each_other(in_files: Path) -> None:
    parts = [np.full((count, 2, 3), count, np.uint16) for count in (4, 1, 2)]
    found = stacked(iter(parts), 7)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, np.concatenate(parts))
    with pytest.raises(ValueError, match="the parts have 7 rows, not 8"):
        stacked(iter(parts), 8)
    with pytest.raises(ValueError, match="the parts have 0 rows, not 8"):
        stacked(iter([]), 8)
