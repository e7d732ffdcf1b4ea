"""Features that an evaluation computed, kept for the next one by what they are of: the pixels, and the model.

They lie in the cache of this machine, below `features/MODEL/`, as chunks of two NumPy files each: digests of pictures,
and their features. A chunk appears whole or not at all, and several evaluations may write at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution, distribution, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator import models
from orchestrator.fsio import folder_beside, move
from orchestrator.models import stats_of
from orchestrator.stages.common import open_network
from orchestrator.storage.cache_folder import cache_folder

if TYPE_CHECKING:
    from orchestrator.stages.evaluate.towers import Tower

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

logger = logging.getLogger("orchestrator")

_DIGESTS, _VALUES = "digests.npy", "values.npy"
_DIGEST_BYTES = 20
_DIGEST = f"S{_DIGEST_BYTES}"
# Bytes and rows of features in a chunk: so much is in memory until it is written.
_CHUNK, _ROWS = 32 * 2**20, 8192
_TRIES = 5


@dataclass(frozen=True)
class _Chunk:
    """Features that lie in a file. In memory is what finds them: 24 bytes a picture.

    Attributes:
        digests: of the pictures, sorted.
        rows: of `values`, in the order of `digests`.
        values: (N, …), mapped.
    """

    digests: NDArray[np.bytes_]
    rows: NDArray[np.int32]
    values: Floats

    def find(self, digests_N: NDArray[np.bytes_]) -> NDArray[np.int32]:
        """The row of each digest, (N,); -1 of those that are not here."""
        if not len(self.digests):
            return np.full(len(digests_N), -1, np.int32)
        at = np.minimum(np.searchsorted(self.digests, digests_N), len(self.digests) - 1)
        return np.where(self.digests[at] == digests_N, self.rows[at], np.int32(-1))


@dataclass
class FeatureMemory:
    """The features of one model.

    Attributes:
        folder: of the model, below that of all models.
        limit: bytes that all models together may take. Models that were not asked for the longest time go first;
            where that is not enough, what is new is not kept.
    """

    folder: Path
    limit: int
    _chunks: dict[str, list[_Chunk]] = field(default_factory=lambda: defaultdict(list))
    # What no chunk has yet, by part and digest.
    _unwritten: dict[tuple[str, bytes], tuple[Floats, int]] = field(default_factory=dict)
    _new: dict[tuple[str, tuple[int, ...]], list[tuple[bytes, Floats]]] = field(default_factory=dict)
    _room: int = 0

    @classmethod
    def opened(cls, key: str, limit: int) -> FeatureMemory:
        """The memory of a model.

        Args:
            key: of the model, see :func:`model_key`.
            limit: see above.
        """
        memory = cls(cache_folder() / "features" / key, limit)
        with contextlib.suppress(OSError):
            _touch(memory.folder)
            memory._room = limit - _make_room(memory.folder, limit)
        for chunk in sorted(memory.folder.glob("*-*")):
            memory._read(chunk)
        return memory

    def through(self, part: str, crops_NHWC: Pixels, compute: Callable[[Pixels], Floats]) -> Floats:
        """Features of crops, (N, …): those that are known are read, the others are computed and kept.

        Args:
            part: which features, `cls` or `patches`.
            crops_NHWC: the crops as the model sees them.
            compute: the features of some of them.
        """
        digests = [_digest(crop_HWC) for crop_HWC in crops_NHWC]
        known = self._find(part, digests)
        missing = [at for at, place in enumerate(known) if place is None]
        if not missing:
            return np.stack([place[0][place[1]] for place in known if place is not None])
        whole = len(missing) == len(digests)
        made = compute(crops_NHWC if whole else crops_NHWC[missing])
        self._keep(part, [digests[at] for at in missing], made)
        if whole:
            return made
        found = np.empty((len(digests), *made.shape[1:]), dtype=np.float32)
        found[missing] = made
        for at, place in enumerate(known):
            if place is not None:
                found[at] = place[0][place[1]]
        return found

    def flush(self) -> None:
        """Write what is new."""
        for (part, _), rows in self._new.items():
            if rows:
                self._write(part, rows)
        self._new.clear()

    def _find(self, part: str, digests: Sequence[bytes]) -> list[tuple[Floats, int] | None]:
        """For each digest the array and the row of its features; None where they are not known."""
        found = [self._unwritten.get((part, digest)) for digest in digests]
        asked = np.array(digests, dtype=_DIGEST)
        for chunk in self._chunks[part]:
            rows = chunk.find(asked)
            for at in np.flatnonzero(rows >= 0).tolist():
                found[at] = chunk.values, int(rows[at])
        return found

    def _keep(self, part: str, digests: Sequence[bytes], made: Floats) -> None:
        if made.nbytes > self._room:
            return
        self._room -= made.nbytes
        rows = self._new.setdefault((part, made.shape[1:]), [])
        values = np.array(made, dtype=np.float32)
        rows += zip(digests, values, strict=True)
        # Known at once: a metric may ask again before they are written.
        self._unwritten |= {(part, digest): (values, row) for row, digest in enumerate(digests)}
        if len(rows) >= _ROWS or len(rows) * rows[0][1].nbytes >= _CHUNK:
            self._write(part, rows)
            rows.clear()

    def _write(self, part: str, rows: list[tuple[bytes, Floats]]) -> None:
        target = self.folder / f"{part}-{uuid.uuid4().hex}"
        try:
            # Another evaluation may have made room meanwhile.
            self.folder.mkdir(parents=True, exist_ok=True)
            with folder_beside(target) as draft:
                chunk = draft / "chunk"
                chunk.mkdir()
                digests = np.frombuffer(b"".join(digest for digest, _ in rows), dtype=np.uint8)
                np.save(chunk / _DIGESTS, digests.reshape(len(rows), _DIGEST_BYTES), allow_pickle=False)
                np.save(chunk / _VALUES, np.stack([value for _, value in rows]), allow_pickle=False)
                # What the disk loses is computed again.
                move(chunk, target, durable=False)
        except OSError as error:
            # The evaluation does not need it.
            logger.info("features of %s pictures are not kept: %s", len(rows), error)
        else:
            self._read(target)
        for digest, _ in rows:
            self._unwritten.pop((part, digest), None)

    def _read(self, chunk: Path) -> None:
        try:
            digests = np.load(chunk / _DIGESTS, allow_pickle=False)
            values = np.load(chunk / _VALUES, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return  # removed meanwhile, or damaged or empty: the pictures are computed again
        if digests.ndim != 2 or len(digests) != len(values) or values.dtype != np.float32:
            return
        if digests.dtype != np.uint8 or digests.shape[1] != _DIGEST_BYTES:
            return
        names = np.ascontiguousarray(digests).view(_DIGEST).reshape(-1)
        order = np.argsort(names)
        part = chunk.name.partition("-")[0]
        self._chunks[part].append(_Chunk(names[order], order.astype(np.int32), values))


def model_key(tower: Tower) -> str | None:
    """What decides a tower's features besides the pixels, as a hash: weights, shape, normalisation, code, device.

    Returns:
        None of a network whose code is not of an installed package with a version: it may have changed.
    """
    source, model = tower.source, tower.model
    code = _versions({type(part).__module__.partition(".")[0] for part in model.modules()})
    if code is None:
        return None
    hashed = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    device = next(model.parameters()).device
    record: dict[str, Any] = {
        "code": code,
        "model": [type(model).__name__, tower.preset, tower.patch, repr(getattr(model, "config", ""))],
        "stats": [list(map(float, channels)) for channels in stats_of(model)],
        "spec": repr(getattr(model, "spec", "")),
        "source": None if source is None else source.model_dump(mode="json", exclude={"from_", "weights"}),
        # Which of the bands it sees.
        "pixels": None if tower.pixels is None else tower.pixels.model_dump(mode="json"),
        "device": device.type,
    }
    hashed.update(json.dumps(record, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw: Pixels = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        hashed.update(raw.data)
    return hashed.hexdigest()


def _digest(crop_HWC: Pixels) -> bytes:
    hashed = hashlib.blake2b(f"{crop_HWC.dtype} {crop_HWC.shape}".encode(), digest_size=_DIGEST_BYTES)
    hashed.update(np.ascontiguousarray(crop_HWC).data)
    return hashed.digest()


def _versions(packages: set[str]) -> dict[str, str] | None:
    """The versions of what brings these packages; None if one of them is not an installed one, or may be edited."""
    found = {"orchestrator": _own_code(), "torch": version("torch")}
    others = packages - set(found)
    brought = packages_distributions() if others else {}
    for package in sorted(others):
        for name in brought.get(package, ()):
            about = distribution(name)
            if not _may_be_edited(about):
                found[package] = f"{name} {about.version}"
        if package not in found:
            return None
    return found


def _may_be_edited(about: Distribution) -> bool:
    """Whether a package is installed from a working copy (PEP 610). Installers write JSON with or without spaces."""
    try:
        record = json.loads(about.read_text("direct_url.json") or "{}")
    except ValueError:
        return True
    info = record.get("dir_info") if isinstance(record, dict) else None
    return isinstance(info, dict) and bool(info.get("editable"))


def _code_files() -> list[Path]:
    """Files of the code of models, and of that which gives them pixels."""
    parts = (Path(open_network.__file__), Path(__file__).with_name("towers.py"))
    return [*sorted(Path(models.__file__).parent.rglob("*.py")), *parts]


@cache
def _own_code() -> str:
    """What the code of models says: in a working copy it changes under one version."""
    hashed = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for path in _code_files():
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def _touch(folder: Path) -> None:
    """Make a model's folder if it is missing, and note that it was asked for now: by its time of change.

    Raises:
        OSError: there can be none.
    """
    for _ in range(_TRIES - 1):
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another evaluation has made room between the two
            os.utime(folder)
            return
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)


def _make_room(own: Path, limit: int) -> int:
    """Remove models that were not asked for the longest time until all take at most `limit` bytes; bytes that stay.

    Others may do the same at the same time: what goes meanwhile takes no bytes.
    """
    found = []
    for folder in own.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if folder.is_dir():
                found.append((folder.stat().st_mtime, folder, _bytes_in(folder)))
    total = sum(size for _, _, size in found)
    for _, folder, size in sorted(found):
        # Half of the room is for what this evaluation computes.
        if total <= limit // 2 or folder == own:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        total -= size
    return total


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.npy"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
