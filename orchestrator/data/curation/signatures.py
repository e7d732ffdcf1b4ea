"""What pictures look like, remembered by what their files hold: a picture is decoded once, wherever it lies later.

What is remembered is a help and never needed, as digests are: without a cache folder that can be written, pictures are
decoded. It takes 4.5 KB a picture of three channels, up to :data:`MOST_BYTES` in all: then what was not asked for the
longest time goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray

from orchestrator.config.pixels import PixelFormat
from orchestrator.data.bands import as_8_bits, moments, resized, shown_rgb
from orchestrator.data.curation import descriptor
from orchestrator.data.curation.descriptor import describe
from orchestrator.data.decode import Pixels
from orchestrator.storage.cache_database import cache_database, set_aside
from orchestrator.storage.cache_folder import cache_folder

THUMBNAIL_SIDE = 32
FILE = "pictures.sqlite3"
# Raised when another signature is made of the same pixels.
_FORMAT = 2
MOST_BYTES = 8 * 2**30
"""The size that the file may have, in bytes."""
# What is left of that after what is old has gone: so it does not go at each write.
_LEFT_SHARE = 0.75
_DAY_S = 86_400
# Pictures that are written at once; so many are lost where a process ends without a word.
_TOGETHER = 256
_BUSY_S = 10.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS signatures (
    digest BLOB NOT NULL, rule BLOB NOT NULL, height INTEGER NOT NULL, width INTEGER NOT NULL, bytes INTEGER NOT NULL,
    peak INTEGER NOT NULL, pixels BLOB NOT NULL, thumbnail BLOB NOT NULL, descriptor BLOB NOT NULL,
    PRIMARY KEY (digest, rule)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS moments (
    digest BLOB NOT NULL, rule BLOB NOT NULL, moments BLOB NOT NULL, PRIMARY KEY (digest, rule)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS embeddings (
    digest BLOB NOT NULL, rule BLOB NOT NULL, vector BLOB NOT NULL, PRIMARY KEY (digest, rule)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS days (
    digest BLOB NOT NULL, rule BLOB NOT NULL, day INTEGER NOT NULL, PRIMARY KEY (digest, rule)
) WITHOUT ROWID;
"""
_TABLES = ("signatures", "moments", "embeddings")
# The day on which all that is in a file was asked for and it had no room, by the file's folder.
_full_on: dict[Path, int] = {}


@dataclass(frozen=True, eq=False)
class ImageSignature:
    """What one decoded picture looks like.

    Attributes:
        height, width: upright, in pixels.
        pixels: sha256 of the decoded pixels, 64 hex digits.
        thumbnail: (1024 C,) uint8, 32 × 32 × C: of all channels, since pictures may differ in one alone.
        descriptor: (336,) float32, see :func:`orchestrator.data.curation.descriptor.describe`.
        moments: (2, C) float64, see :func:`orchestrator.data.bands.moments`; None where mean and deviation are known.
        bytes, peak: see :class:`orchestrator.data.sources.scan.ScannedImage`.
    """

    height: int
    width: int
    pixels: str
    thumbnail: NDArray[np.uint8]
    descriptor: NDArray[np.float32]
    moments: NDArray[np.float64] | None = None
    bytes: int = 0
    peak: int = 0


def decoder_versions() -> list[str]:
    """The versions of what decodes and resizes pictures: others may give other pixels."""
    found = [cv2.__version__, PIL.__version__, simplejpeg.__version__]
    # HEIC files are decoded where it is installed.
    with contextlib.suppress(PackageNotFoundError):
        found.append(f"pillow-heif {version('pillow-heif')}")
    return found


def signature_of(pixels_HWC: Pixels, how: PixelFormat | None) -> ImageSignature:
    """The signature of a decoded picture, (H, W, C), that is seen as `how` says."""
    digest = hashlib.sha256(f"{pixels_HWC.shape}".encode() + pixels_HWC.tobytes()).hexdigest()
    # Whole numbers already, so that a byte each is enough.
    small = resized(as_8_bits(pixels_HWC), THUMBNAIL_SIDE, cv2.INTER_AREA)
    described = describe(shown_rgb(pixels_HWC, how))
    measured = moments(pixels_HWC) if how is not None and how.is_measured else None
    height, width = pixels_HWC.shape[:2]
    return ImageSignature(height, width, digest, small.reshape(-1), described, measured)


class SignatureCache:
    """The signatures of one dataset's pictures by the sha256 of their files.

    Those of this run are in memory; they are also in `pictures.sqlite3` of the cache folder, for the next run. Several
    threads may use it at once.

    Args:
        max_pixels, pixels: how the dataset's files are decoded: another way is remembered apart from this one.
    """

    def __init__(self, max_pixels: int, pixels: PixelFormat | None) -> None:
        self._how = pixels or PixelFormat()
        how = pixels and pixels.record()
        named = [_FORMAT, max_pixels, how, *decoder_versions()]
        self._rule = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).digest()[:16]
        self._known: dict[str, ImageSignature] = {}
        self._fresh: list[str] = []
        self._lock = threading.Lock()

    def load(self, digests: Sequence[str]) -> None:
        """Take up what is remembered of these files, so that :meth:`find` knows it."""
        channels = self._how.num_channels
        with self._lock:
            measured = self._moments(digests) if self._how.is_measured else {}
            for digest, (height, width, size, peak, pixels, small, described) in _read(
                "signatures", self._rule, digests
            ):
                if self._how.is_measured and digest not in measured:
                    continue
                if len(small) == channels * THUMBNAIL_SIDE**2 and len(described) == 4 * descriptor.DIM:
                    looks = np.frombuffer(small, np.uint8), np.frombuffer(described, "<f4")
                    self._known[digest] = ImageSignature(
                        height, width, pixels.hex(), *looks, measured.get(digest), size, peak
                    )

    def _moments(self, digests: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """What is remembered of the moments of files, by digest."""
        shape = 2, self._how.num_channels
        return {
            digest: np.frombuffer(found, "<f8").reshape(shape)
            for digest, (found,) in _read("moments", self._rule, digests)
            if len(found) == 8 * shape[0] * shape[1]
        }

    def find(self, sha256: str) -> ImageSignature | None:
        """What is known of a file's content; None if it has to be decoded."""
        return self._known.get(sha256)

    def note(self, sha256: str, pixels: Pixels, size: int, peak: int) -> None:
        """Remember the signature of a file of so many bytes that was decoded."""
        signature = replace(signature_of(pixels, self._how), bytes=size, peak=peak)
        with self._lock:
            if sha256 in self._known:
                return
            self._known[sha256] = signature
            self._fresh.append(sha256)
            if len(self._fresh) >= _TOGETHER:
                self._write()

    def save(self) -> None:
        """Write what is not written yet."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        found = [(digest, self._known[digest]) for digest in self._fresh]
        _write(
            "moments",
            [
                (bytes.fromhex(digest), self._rule, one.moments.astype("<f8").tobytes())
                for digest, one in found
                if one.moments is not None
            ],
        )
        rows = [
            (
                bytes.fromhex(digest),
                self._rule,
                one.height,
                one.width,
                one.bytes,
                one.peak,
                bytes.fromhex(one.pixels),
                one.thumbnail.tobytes(),
                one.descriptor.astype("<f4").tobytes(),
            )
            for digest, one in found
        ]
        self._fresh = []
        _write("signatures", rows)


class EmbeddingCache:
    """The vectors that a network made of pictures, by the sha256 of their files; in the same database.

    Args:
        identity: of the network and all that its vectors depend on besides the file. None: nothing is remembered.
    """

    def __init__(self, identity: str | None) -> None:
        self._rule = None if identity is None else hashlib.sha256(identity.encode()).digest()[:16]

    def find(self, digests: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """The vectors that are known, (D,) each, of the same D."""
        if self._rule is None:
            return {}
        found = {
            digest: np.frombuffer(vector, "<f4")
            for digest, (vector,) in _read("embeddings", self._rule, digests)
            if vector and len(vector) % 4 == 0
        }
        return found if len({len(vector) for vector in found.values()}) == 1 else {}

    def note(self, vectors: Sequence[tuple[str, NDArray[np.float32]]]) -> None:
        """Remember vectors."""
        if self._rule is None:
            return
        rows = [
            (bytes.fromhex(digest), self._rule, vector.astype("<f4").tobytes()) for digest, vector in vectors
        ]
        _write("embeddings", rows)


def _read(table: str, rule: bytes, digests: Sequence[str]) -> list[tuple[str, tuple[Any, ...]]]:
    """Digest and the other columns of what a table has of these files; what cannot be read is not there."""
    found: list[tuple[str, tuple[Any, ...]]] = []
    query = f"SELECT * FROM {table} WHERE digest = ? AND rule = ?"
    try:
        with cache_database(FILE, _SCHEMA, _BUSY_S) as connection:
            for digest in digests:
                row = connection.execute(query, (bytes.fromhex(digest), rule)).fetchone()
                if row is not None:
                    found.append((digest, row[2:]))
            _note_asked(connection, rule, [digest for digest, _ in found])
    except (sqlite3.Error, OSError) as error:
        set_aside(error, FILE, "what pictures look like is")
    return found


def _write(table: str, rows: Sequence[tuple[object, ...]]) -> None:
    """Add rows to a table, in one transaction."""
    if not rows:
        return
    places = ", ".join("?" * len(rows[0]))
    try:
        with cache_database(FILE, _SCHEMA, _BUSY_S) as connection:
            if not _has_room(connection):
                return
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({places})", rows)
            connection.executemany(
                "INSERT OR REPLACE INTO days VALUES (?, ?, ?)", [(*row[:2], _today()) for row in rows]
            )
            connection.execute("COMMIT")
    except (sqlite3.Error, OSError) as error:
        set_aside(error, FILE, "what pictures look like is")


# --- what goes when there is no room ------------------------------------------------------------------------------


def _today() -> int:
    """The number of the day."""
    return int(time.time() // _DAY_S)


def _note_asked(connection: sqlite3.Connection, rule: bytes, digests: Sequence[str]) -> None:
    """Put down that these were asked for today; nothing is written where that is known."""
    today = _today()
    query = "SELECT day FROM days WHERE digest = ? AND rule = ?"
    old = []
    for digest in digests:
        row = connection.execute(query, (bytes.fromhex(digest), rule)).fetchone()
        if row is None or row[0] != today:
            old.append((bytes.fromhex(digest), rule, today))
    if old:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT OR REPLACE INTO days VALUES (?, ?, ?)", old)
        connection.execute("COMMIT")


def _has_room(connection: sqlite3.Connection) -> bool:
    """Whether more may be written, once what was not asked for the longest time has gone if the file is too large.

    What was asked for today stays: where that alone is too much, what is new is not kept.
    """
    if _bytes_in(connection) <= MOST_BYTES:
        return True
    folder, today = cache_folder(), _today()
    if _full_on.get(folder) == today:
        return False  # to look for what may go means to read all of it
    connection.execute("BEGIN IMMEDIATE")
    # Of what has no day, an earlier version asked last.
    for table in _TABLES:
        connection.execute(
            f"DELETE FROM {table} WHERE NOT EXISTS (SELECT 1 FROM days WHERE days.digest = {table}.digest "
            f"AND days.rule = {table}.rule)"
        )
    connection.execute("COMMIT")
    while _bytes_in(connection) > _LEFT_SHARE * MOST_BYTES:
        ((oldest,),) = connection.execute("SELECT MIN(day) FROM days")
        if oldest is None or oldest >= today:
            break
        connection.execute("BEGIN IMMEDIATE")
        for table in _TABLES:
            connection.execute(
                f"DELETE FROM {table} WHERE EXISTS (SELECT 1 FROM days WHERE days.digest = {table}.digest "
                f"AND days.rule = {table}.rule AND days.day = ?)",
                (oldest,),
            )
        connection.execute("DELETE FROM days WHERE day = ?", (oldest,))
        connection.execute("COMMIT")
    has_room = _bytes_in(connection) <= MOST_BYTES
    if not has_room:
        _full_on[folder] = today
    return has_room


def _bytes_in(connection: sqlite3.Connection) -> int:
    """Bytes of the pages that hold something; SQLite writes into the others before the file grows."""
    (pages,), (free,), (size,) = (
        connection.execute(f"PRAGMA {name}").fetchone()
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)
