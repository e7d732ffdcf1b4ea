"""A folder of images as a file of embeddings, in one pass and in bounded memory; every file is accounted for."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.pixels import PixelFormat
from orchestrator.config.schema import MAX_PIXELS
from orchestrator.data.decode import Pixels, UnreadableImage, read_square
from orchestrator.data.read_ahead import in_order
from orchestrator.data.sources.folder import LeftOut, Listing, shown
from orchestrator.errors import UserError
from orchestrator.inference.embedded_parts import EVERY_S, EmbeddedParts
from orchestrator.inference.embeddings import EmbeddedFile, EmbeddingsWriter, Floats, Made, writing
from orchestrator.inference.model import Model

Progress = Callable[[int, int], None]
"""Is told how many files were handled, and of how many."""


@dataclass(frozen=True)
class Embedded:
    """What came of a folder.

    Attributes:
        num_images: with a vector.
        dim: of a vector.
        unreadable: image files that could not be decoded, and why.
        left_out: what was not taken for an image, and why.
        num_before: images whose vectors were there already, since an earlier call for the same file was interrupted.
    """

    num_images: int
    dim: int
    unreadable: tuple[LeftOut, ...]
    left_out: tuple[LeftOut, ...]
    num_before: int = 0


@dataclass(frozen=True)
class _Read:
    file: EmbeddedFile
    square: Pixels | None
    error: str | None


def made_of(folder: Path, listing: Listing, model: str, weights: str, size: int) -> Made:
    """How the embeddings of a folder as it is now would be made; see :class:`Made` for the arguments."""
    return Made(model, weights, size, str(folder.resolve()), _digest(folder, listing))


def embed_folder(
    model: Model,
    listing: Listing,
    out: Path,
    made: Made,
    *,
    batch: int,
    loaders: int,
    progress: Progress = lambda done, total: None,
    max_pixels: int = MAX_PIXELS,
    group_rows: int | None = None,
    part_s: float = EVERY_S,
) -> Embedded:
    """Embed all images of a folder, in the order of their paths.

    What is done is kept in parts beside the file. If this is interrupted, the next call for the same file, model, size,
    batch and images goes on after the last part; the file is the same, to the last byte.

    Args:
        model: of :func:`orchestrator.load`.
        listing: of the folder `made.folder`.
        out: the file to write, in a folder that is there; it appears when it is whole.
        made: how; `made.size` is the side at which images are seen.
        batch: images in one forward pass.
        loaders: threads that read images; up to two batches wait for the model.
        progress: called with how many files are done, and of how many: before the first batch, when it is those of an
            earlier call, and after each batch.
        max_pixels: the largest width × height of an image.
        group_rows: see :func:`writing`.
        part_s: seconds of work in a part.

    Raises:
        UserError: none of the files can be read.
        OSError: the file cannot be written.
    """
    root, total = Path(made.folder), len(listing.files)
    parts = EmbeddedParts(out, made, batch, part_s)

    def read(name: str) -> _Read:
        return _read(root / name, name, made.size, max_pixels, model.pixels)

    with writing(out, made, group_rows=group_rows) as writer:
        embedding = _Embedding(model, writer, parts)
        begun = embedding.go_on()
        num_before = embedding.num_images
        progress(begun, total)
        for seen, one in enumerate(
            in_order(read, listing.files[begun:], loaders, ahead=2 * batch), begun + 1
        ):
            if embedding.add(one) == batch:
                embedding.flush(seen)
                progress(seen, total)
        embedding.flush(total)
        progress(total, total)
        unreadable = embedding.unreadable
        if not embedding.num_images:
            raise UserError(
                f"none of the {total} image files in {shown(made.folder)} can be read: {by_reason(unreadable)}",
                where=shown(made.folder),
            )
        writer.finish(listing.left_out, unreadable)
    parts.remove()
    return Embedded(embedding.num_images, embedding.dim, tuple(unreadable), listing.left_out, num_before)


class _Embedding:
    """Images on their way through the model, into the file and its parts.

    Attributes:
        num_images: with a vector in the file.
        dim: of a vector; 0 while there is none.
        unreadable: image files that could not be decoded.
    """

    def __init__(self, model: Model, writer: EmbeddingsWriter, parts: EmbeddedParts) -> None:
        self._model, self._writer, self._parts = model, writer, parts
        self._taken: list[_Read] = []
        self.unreadable: list[LeftOut] = []
        self.num_images = self.dim = 0
        # Unreadable files that a part names already.
        self._recorded = 0

    def go_on(self) -> int:
        """Take over the parts of an earlier call, and give the number of files that it has seen."""
        seen = 0
        for part in self._parts.read():
            self._write(part.files, part.vectors_ND)
            self.unreadable += part.unreadable
            seen, self._recorded = part.seen, len(self.unreadable)
        return seen

    def add(self, one: _Read) -> int:
        """Take an image, or note that it is unreadable, and give the number of images that wait for the model."""
        if one.error is None:
            self._taken.append(one)
        else:
            self.unreadable.append(LeftOut(shown(one.file.path), one.error))
        return len(self._taken)

    def flush(self, seen: int) -> None:
        """Embed the images that wait, of the first `seen` files."""
        from orchestrator.inference.forward import image_vectors

        if not self._taken:
            return
        squares = [one.square for one in self._taken if one.square is not None]
        vectors_ND = image_vectors(self._model.module, squares)
        files = [one.file for one in self._taken]
        self._write(files, vectors_ND)
        self._parts.add(files, vectors_ND, self.unreadable[self._recorded :], seen)
        self._recorded = len(self.unreadable)
        self._taken.clear()

    def _write(self, files: Sequence[EmbeddedFile], vectors_ND: Floats) -> None:
        self._writer.add(files, vectors_ND)
        self.num_images, self.dim = self.num_images + len(files), vectors_ND.shape[1]


def by_reason(left_out: list[LeftOut] | tuple[LeftOut, ...], most: int = 5) -> str:
    """`3 × hidden; 1 × the file is empty`, the most frequent reasons first."""
    counts = Counter(item.reason for item in left_out).most_common()
    named = "; ".join(f"{count:,} × {reason}" for reason, count in counts[:most])
    return f"{named}; and {len(counts) - most} more reasons" if len(counts) > most else named


def _digest(folder: Path, listing: Listing) -> str:
    """A sha256 of the names, sizes and times of change of the images: no file is read for it.

    One that goes while this looks counts as empty; it will be among the unreadable ones.
    """
    whole = hashlib.sha256()
    for name in listing.files:
        try:
            status = (folder / name).stat()
            size, changed = status.st_size, status.st_mtime_ns
        except OSError:
            size, changed = 0, 0
        whole.update(f"{len(name)}:{name} {size} {changed};".encode())
    return whole.hexdigest()


def _read(path: Path, name: str, size: int, max_pixels: int, pixels: PixelFormat | None) -> _Read:
    """A file as a square, with the digest of its content; never raises for what a file is."""
    seen = [("", 0)]

    def note(data: bytes) -> None:
        seen.append((hashlib.sha256(data).hexdigest(), len(data)))

    try:
        square, error = read_square(path, size, max_pixels, note, pixels), None
    except UnreadableImage as problem:
        square, error = None, problem.reason
    return _Read(EmbeddedFile(name, *seen[-1]), square, error)
