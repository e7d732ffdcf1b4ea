"""The images that are nearest to an image or a text: exact, by blocks of a file of embeddings."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator import disk
from orchestrator.data.sources.folder import list_folder, shown
from orchestrator.errors import UserError
from orchestrator.inference.embed_folder import Progress, embed_folder, made_of
from orchestrator.inference.embeddings import Embeddings, Made, open_embeddings
from orchestrator.inference.images import square_of
from orchestrator.inference.model import Model, embedding_side, load_weights, text_vectors
from orchestrator.inference.reference import Located, locate, weights_digest
from orchestrator.storage.cache_folder import cache_folder

Floats = NDArray[np.float32]

# Of a cosine in float32.
_DECIMALS = 6


@dataclass(frozen=True)
class Match:
    """An image of a file of embeddings, by its path relative to the folder, and its cosine similarity, -1 to 1."""

    path: str
    similarity: float


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        matches: the nearest images, the nearest first.
        folder: that their paths are relative to.
        num_images: that were compared.
        num_unreadable: images of the folder that could not be decoded.
    """

    matches: tuple[Match, ...]
    folder: Path
    num_images: int
    num_unreadable: int


def search(
    source: Path,
    *,
    photo: Path | None,
    text: str | None,
    top: int,
    model: str | None,
    tracking: str | None,
    size: int | None,
    batch: int,
    loaders: int,
    progress: Progress = lambda done, total: None,
) -> SearchResult:
    """The images of a folder, or of a file that `orchestrator embed` wrote, that are nearest to a photo or a text.

    Args:
        source: the folder or the file. A folder is embedded, unless the cache has it.
        photo: an image file. Or:
        text: with a model that has a text tower.
        top: how many images.
        model: see :func:`orchestrator.load`; default: the one that the file was made with.
        tracking: see there.
        size: pixels a side at which images are seen; default: what the file or the model says.
        batch, loaders, progress: see :func:`embed_folder`.

    Raises:
        UserError: one of these is not there or does not fit.
    """
    if (photo is None) == (text is None):
        raise UserError(
            "search takes either a photo or a text: give one of them", hint='give PHOTO, or --text "a dog"'
        )
    if not source.exists():
        raise UserError(
            f"{shown(str(source))} does not exist",
            hint="give a folder of images, or a file that `orchestrator embed` wrote",
        )
    if source.is_dir():
        if model is None:
            raise UserError(
                f"no model is named to embed the folder {shown(str(source))} with",
                hint="add --model NAME@champion, or --model FOLDER",
            )
        located = locate(model, tracking)
        made, path = None, source
    else:
        with open_embeddings(source) as embeddings:
            made, path = embeddings.made, source
        located = _same_model(source, made, model, tracking)
        if size not in (None, made.size):
            raise UserError(f"{source} was made at {made.size} pixels, not {size}", hint="leave --size out")
    loaded = _on_device(load_weights(located.path))
    side = embedding_side(loaded, size if made is None else made.size)
    # Before a folder is embedded for it: a mistake in it shows at once.
    query_D = _query(loaded, photo, text, side)
    if made is None:
        weights = weights_digest(located.path)
        path = embeddings_of(
            loaded, source, located.name, weights, side, batch=batch, loaders=loaders, progress=progress
        )
    with open_embeddings(path) as embeddings:
        matches = nearest_images(embeddings, query_D, top)
        folder = source if made is None else Path(made.folder)
        return SearchResult(tuple(matches), folder, embeddings.num_rows, embeddings.num_unreadable)


def nearest_images(
    embeddings: Embeddings, query_D: Floats, top: int, *, block_rows: int = 8192
) -> list[Match]:
    """The `top` images with the greatest cosine similarity, the nearest first.

    Those whose similarities agree in six decimals come in the order of the file.

    Every image is compared. Only one block of vectors is in memory at a time.

    Args:
        embeddings: of length 1.
        query_D: of length 1.
        top: at least 1; fewer come if there are fewer images.
        block_rows: images of a block.

    Raises:
        UserError: the file is damaged, or its vectors are of another width.
    """
    if query_D.shape != (embeddings.dim,):
        raise UserError(
            f"the file's vectors have {embeddings.dim} values, the model's {len(query_D)}",
            hint="search with the model that the file was made with",
        )
    found: list[tuple[float, int, str]] = []
    first = 0
    for paths, vectors_ND in embeddings.blocks(block_rows):
        # What is not a number is near to nothing. The last digit depends on a row's place in its block.
        cosines_N = np.nan_to_num(np.round(vectors_ND @ query_D, _DECIMALS), nan=-np.inf)
        rows = np.argsort(-cosines_N, kind="stable")[:top]
        found += [(-float(cosines_N[row]), first + int(row), paths[int(row)].as_py()) for row in rows]
        found = sorted(found)[:top]
        first += len(paths)
    return [Match(path, -negative) for negative, _, path in found]


def embeddings_of(
    model: Model,
    folder: Path,
    name: str,
    weights: str,
    size: int,
    *,
    batch: int,
    loaders: int,
    progress: Progress = lambda done, total: None,
) -> Path:
    """The file of a folder's embeddings: from the cache, or made and kept there.

    The cache has one file for each folder, model and size. It is used as long as no image in the folder has come, gone
    or changed, by names, sizes and times of change; the weights are compared by their sha256.

    Args:
        model: of :func:`orchestrator.load`.
        folder: of images.
        name, weights, size: see :class:`Made`.
        batch, loaders, progress: see :func:`embed_folder`.

    Raises:
        UserError: no such folder, no image in it that can be read, or a cache that cannot be written.
    """
    listing = list_folder(folder)
    made = made_of(folder, listing, name, weights, size)
    key = hashlib.sha256(f"{made.folder}\0{weights}\0{size}".encode("utf-8", "surrogateescape")).hexdigest()
    path = cache_folder() / "embeddings" / f"{key}.parquet"
    if _is_current(path, made):
        return path
    disk.make_folder(
        path.parent,
        "name another folder in the environment variable ORCHESTRATOR_CACHE",
        "the cache cannot be written",
    )
    embed_folder(model, listing, path, made, batch=batch, loaders=loaders, progress=progress)
    return path


def _is_current(path: Path, made: Made) -> bool:
    if not path.exists():
        return False
    try:
        with open_embeddings(path) as kept:
            # The same weights under another name are the same.
            return replace(kept.made, model=made.model) == made
    except UserError:
        return False


def _same_model(source: Path, made: Made, model: str | None, tracking: str | None) -> Located:
    """The model that a file was made with: the one that is named, or else the one that the file names."""
    located = locate(model or made.model, tracking)
    if weights_digest(located.path) != made.weights:
        raise UserError(
            f"{source} was made with other weights than those of {model or made.model}: with those of {made.model} at "
            "that time",
            where=str(source),
            hint="name the model with --model, or embed the folder again",
        )
    return located


def _query(model: Model, photo: Path | None, text: str | None, side: int) -> Floats:
    """The vector of a photo or a text, of length 1."""
    from orchestrator.inference.forward import image_vectors

    if photo is None:
        assert text is not None
        found = text_vectors(model, [text])
    else:
        found = image_vectors(model.module, [square_of(photo, side, model.pixels)])
    vector_D: Floats = found[0]
    return vector_D


def _on_device(model: Model) -> Model:
    from orchestrator.inference.forward import on_device

    return on_device(model)
