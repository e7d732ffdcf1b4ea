"""Pictures with boxes, as COCO's JSON files describe them: read, checked, and listed as an index."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.boxes import BoxData
from orchestrator.data.decode import UnreadableImage, read_header, upright_size
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.errors import UserError, shortened
from orchestrator.fsio import sha256_of

T = TypeVar("T")

_PARTS = ("images", "annotations", "categories")


class _Boxes(NamedTuple):
    """Corners, and the numbers of categories."""

    corners: list[tuple[float, float, float, float]]
    categories: list[int]

    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        return np.array(self.corners, np.float64).reshape(-1, 4), np.array(self.categories, np.int64)


@dataclass
class _Picture:
    path: str
    width: int
    height: int
    where: str
    things: _Boxes = field(default_factory=lambda: _Boxes([], []))
    crowds: _Boxes = field(default_factory=lambda: _Boxes([], []))


class BoxPictures:
    """The pictures of a data set with boxes, by row in the order of their paths.

    Groups of things in one box (`iscrowd`) are kept apart.

    Attributes:
        names: of the categories, by their numbers.

    Args:
        data: which.

    Raises:
        UserError: a file cannot be read or lacks a part, a picture is not there, or a box is none.
    """

    def __init__(self, data: BoxData) -> None:
        self._root = data.path
        self.names: dict[int, str] = {}
        found: dict[str, _Picture] = {}
        files: dict[str, list[str]] | None = None
        for path in data.annotations:
            record = _record(path)
            self._add_names(record["categories"], path)
            by_id: dict[Any, _Picture] = {}
            for image in record["images"]:
                name, width, height = _fields(image, ("file_name", "width", "height", "id"), path)[:3]
                if not (data.path / str(name)).is_file():
                    files = _by_name(data.path) if files is None else files
                    name = _only(files.get(Path(str(name)).name, []), str(name), data.path, path)
                if not (_is_whole(width) and _is_whole(height) and min(width, height) > 0):
                    what = (
                        f"the size of the picture {name!s:.80} is {shortened(f'{width!r} x {height!r}', 80)}"
                    )
                    raise UserError(
                        what, where=str(path), hint="`width` and `height` are whole numbers of pixels"
                    )
                picture = _Picture(str(name), int(width), int(height), str(path))
                if found.setdefault(picture.path, picture) is not picture:
                    raise UserError(
                        f"the picture {picture.path} is described twice",
                        where=str(path),
                        hint="leave one out",
                    )
                number = image["id"]
                if not isinstance(number, (int, str)) or number in by_id:
                    what = f"the id {shortened(repr(number), 40)} of the picture {picture.path} "
                    what += (
                        "is that of another one, too" if isinstance(number, (int, str)) else "is not a number"
                    )
                    raise UserError(what, where=str(path), hint="give each picture an `id` of its own")
                by_id[number] = picture
            for box in record["annotations"]:
                self._add_box(box, by_id, path)
        self._pictures = [found[name] for name in sorted(found)]
        if not self._pictures:
            raise UserError("there are no pictures with boxes", where=str(data.annotations[0]))

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def paths(self) -> list[Path]:
        """The pictures' files."""
        return [self._root / picture.path for picture in self._pictures]

    def size(self, row: int) -> tuple[int, int]:
        """Height and width that the boxes of a picture are in."""
        return self._pictures[row].height, self._pictures[row].width

    def boxes(self, row: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Boxes (M, 4) as left, top, right, bottom in pixels, and the numbers of their categories (M,)."""
        return self._pictures[row].things.arrays()

    def crowds(self, row: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The boxes of groups, as those of :meth:`boxes`."""
        return self._pictures[row].crowds.arrays()

    def check(self) -> None:
        """Compare the sizes of pictures with those that the boxes are in.

        Raises:
            UserError: a picture is of another size, or cannot be read.
        """

        def one(row: int) -> None:
            picture = self._pictures[row]
            size = _read(self._root / picture.path, upright_size)
            if size != (picture.width, picture.height):
                raise UserError(
                    f"{picture.path} has {size[0]}x{size[1]} pixels, and its boxes are in "
                    f"{picture.width}x{picture.height}",
                    where=picture.where,
                    hint="scale the boxes, or restore the pictures that they were drawn in",
                )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(one, range(len(self))))

    def index(self) -> ImageIndex:
        """The pictures as an index, whose rows are those of this."""
        root = self._root.resolve()

        def record(picture: _Picture) -> ImageRecord:
            path = root / picture.path
            header = _read(path, read_header)
            return ImageRecord(
                root.name, picture.path, str(root), sha256_of(path), header.width, header.height
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return ImageIndex(list(pool.map(record, self._pictures)))

    def _add_names(self, categories: list[Any], path: Path) -> None:
        for category in categories:
            number, name = _fields(category, ("id", "name"), path)
            if not _is_whole(number):
                what = f"the id of the category {name!s:.80} is {shortened(repr(number), 40)}"
                raise UserError(what, where=str(path), hint="`id` is a whole number")
            if self.names.setdefault(int(number), str(name)) != str(name):
                raise UserError(
                    f"the category {number} is {self.names[int(number)]!r} and {str(name)!r}",
                    where=str(path),
                    hint="give all files the same categories",
                )

    def _add_box(self, box: Any, by_id: Mapping[Any, _Picture], path: Path) -> None:
        image, category, corners = _fields(box, ("image_id", "category_id", "bbox"), path)
        picture = by_id.get(image) if isinstance(image, (int, str)) else None
        if picture is None or not _is_whole(category) or category not in self.names:
            of = f"image {image!r}" if picture is None else f"category {category!r}"
            what = shortened(of, 80)
            raise UserError(f"a box refers to {what}, which does not exist", where=str(path))
        numbers = corners if isinstance(corners, list) and len(corners) == 4 else [math.nan]
        if not all(_is_finite(each) for each in numbers):
            raise UserError(
                f"a box of {picture.path} is {shortened(str(corners), 80)}",
                where=str(path),
                hint="`bbox` is left, top, width and height in pixels",
            )
        left, top, width, height = map(float, numbers)
        if width <= 0 or height <= 0:
            return  # COCO itself has a few without an area
        if left >= picture.width or top >= picture.height or left + width <= 0 or top + height <= 0:
            raise UserError(
                f"a box of {picture.path}, {corners}, lies outside of its {picture.width}x{picture.height} pixels",
                where=str(path),
                hint="`bbox` is left, top, width and height in pixels",
            )
        boxes = picture.crowds if box.get("iscrowd") else picture.things
        boxes.corners.append((left, top, left + width, top + height))
        boxes.categories.append(int(category))


def _record(path: Path) -> dict[str, list[Any]]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"the boxes cannot be read: {error}", where=str(path), hint="copy the file again"
        ) from error
    lacking = [
        part for part in _PARTS if not isinstance(record, dict) or not isinstance(record.get(part), list)
    ]
    if lacking:
        raise UserError(
            f"the file has no list {', '.join(map(repr, lacking))}",
            where=str(path),
            hint="COCO's format has `images`, `annotations` and `categories`",
        )
    return {part: record[part] for part in _PARTS}


def _fields(entry: Any, names: tuple[str, ...], path: Path) -> list[Any]:
    if not isinstance(entry, dict) or any(name not in entry for name in names):
        raise UserError(
            f"an entry lacks one of {', '.join(names)}: {shortened(str(entry), 100)}", where=str(path)
        )
    return [entry[name] for name in names]


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number that arrays can hold; some write 640.0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**53 and value == int(value)


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**53 if isinstance(value, int) else math.isfinite(value)


def _by_name(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.setdefault(path.name, []).append(path.relative_to(folder).as_posix())
    return found


def _only(paths: list[str], name: str, root: Path, where: Path) -> str:
    if len(paths) == 1:
        return paths[0]
    count = Counter(paths).total()
    raise UserError(
        f"there is no picture {name} in {root}"
        if not count
        else f"{count} pictures are called {name} in {root}",
        where=str(where),
        hint="`file_name` is a path below `path`",
    )


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except UnreadableImage as error:
        raise UserError(
            f"a picture cannot be read: {error.reason}", where=str(path), hint="copy it again"
        ) from error
