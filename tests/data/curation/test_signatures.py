"""What pictures look like is remembered for the decoders that were asked."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
import simplejpeg

from orchestrator.data.curation import signatures
from orchestrator.data.curation.signatures import EmbeddingCache, SignatureCache

_DIGEST = "ab" * 32


@pytest.mark.parametrize("decoder", [cv2, PIL, simplejpeg])
def test_another_version_of_a_decoder_decodes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: object
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    first = SignatureCache(10**6, None)
    first.note(_DIGEST, np.zeros((40, 50, 3), np.uint8), 100, 0)
    first.save()

    def is_known() -> bool:
        cache = SignatureCache(10**6, None)
        cache.load([_DIGEST])
        return cache.find(_DIGEST) is not None

    assert is_known()
    monkeypatch.setattr(decoder, "__version__", "another")
    assert not is_known()


@pytest.mark.parametrize(("before", "after"), [(None, "1.0"), ("1.0", "1.1")])
def test_another_version_of_pillow_heif_decodes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))

    def installed(number: str | None) -> None:
        def version(name: str) -> str:
            if number is None or name != "pillow-heif":
                raise PackageNotFoundError(name)
            return number

        monkeypatch.setattr(signatures, "version", version)

    installed(before)
    first = SignatureCache(10**6, None)
    first.note(_DIGEST, np.zeros((40, 50, 3), np.uint8), 100, 0)
    first.save()
    for number, is_known in ((before, True), (after, False)):
        installed(number)
        cache = SignatureCache(10**6, None)
        cache.load([_DIGEST])
        assert (cache.find(_DIGEST) is not None) == is_known


def _vectors(*numbers: int) -> list[tuple[str, np.ndarray]]:
    return [(f"{number:064x}", np.full(1000, number, np.float32)) for number in numbers]


def _known(cache: EmbeddingCache, *numbers: int) -> list[int]:
    return [int(digest, 16) for digest in cache.find([f"{number:064x}" for number in numbers])]


def test_what_was_not_asked_for_the_longest_time_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    monkeypatch.setattr(signatures, "MOST_BYTES", 450_000)
    today = [100]
    monkeypatch.setattr(signatures, "_today", lambda: today[0])
    cache = EmbeddingCache("a network")
    # 4 KB each, of which SQLite makes about 5: room for some 90.
    for first in range(0, 60, 20):
        cache.note(_vectors(*range(first, first + 20)))
        today[0] += 1
    assert _known(cache, *range(20)) == list(range(20)), "asked for again"
    today[0] += 1
    for first in range(60, 120, 20):
        cache.note(_vectors(*range(first, first + 20)))
        today[0] += 1
    kept = _known(cache, *range(120))
    assert kept[:20] == list(range(20)), "the oldest were asked for last"
    assert not set(kept) & set(range(20, 40)), "these were not"
    assert set(range(100, 120)) <= set(kept)
    assert (tmp_path / signatures.FILE).stat().st_size < 600_000


def test_what_is_of_today_stays_and_what_is_new_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    monkeypatch.setattr(signatures, "MOST_BYTES", 200_000)
    cache = EmbeddingCache("a network")
    for first in range(0, 200, 20):
        cache.note(_vectors(*range(first, first + 20)))
    kept = _known(cache, *range(200))
    assert kept == list(range(len(kept)))
    assert 20 <= len(kept) <= 80
    monkeypatch.setattr(signatures, "MOST_BYTES", 10**9)
    cache.note(_vectors(500))
    assert _known(cache, 500) == [500]


def test_a_full_file_is_searched_for_what_may_go_once_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    monkeypatch.setattr(signatures, "MOST_BYTES", 200_000)
    today, searched, opened = [100], [0], signatures.cache_database
    monkeypatch.setattr(signatures, "_today", lambda: today[0])

    @contextlib.contextmanager
    def traced(file: str, schema: str, busy_s: float) -> Iterator[sqlite3.Connection]:
        with opened(file, schema, busy_s) as connection:
            connection.set_trace_callback(
                lambda text: searched.append(searched.pop() + text.startswith("DELETE"))
            )
            yield connection

    monkeypatch.setattr(signatures, "cache_database", traced)
    cache = EmbeddingCache("a network")
    for first in range(0, 200, 20):
        cache.note(_vectors(*range(first, first + 20)))
    assert searched[0] == 3, "once each table"
    today[0] += 1
    cache.note(_vectors(500))
    assert _known(cache, 500) == [500]


def test_what_an_earlier_version_wrote_goes_before_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    cache = EmbeddingCache("a network")
    cache.note(_vectors(*range(40)))
    with sqlite3.connect(tmp_path / signatures.FILE) as connection:
        connection.execute("DROP TABLE days")
    assert _known(cache, 3) == [3], "it is known, and has a day now"
    monkeypatch.setattr(signatures, "MOST_BYTES", 150_000)
    cache.note(_vectors(60))
    assert _known(cache, *range(40), 60) == [3, 60]
