"""Stamps on desktop backgrounds: what the foreground is asked of, and, without their masks, training pictures."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import cv2

from bench.learning import measure, sets
from bench.learning.measure import Scenes
from orchestrator.data.decode import read_header, read_rgb
from orchestrator.data.index import ImageRecord
from orchestrator.data.samples import DebianPackage, cached_debian, unpack_debian
from orchestrator.fsio import folder_beside, move, sha256_of
from orchestrator.storage.cache_folder import cache_folder

# What cut-outs are laid on: photographs and drawn backgrounds of a desktop (GPL-2+, CC-BY-SA-4.0).
WALLPAPERS = DebianPackage(
    "mate-backgrounds", "1.26.0-1", "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04"
)
_WALLPAPERS_FOLDERS = ("abstract", "nature")
# The same picture in another size.
_OTHER_SIZE = re.compile(r"_\d+x\d+$")
_WALLPAPER_SIDE = 256


@cache
def foreground_scenes(count: int) -> tuple[Scenes, Scenes]:
    """Stamps on wallpapers: training ones on some, held-out ones on others."""
    stamps, walls = sets.split(sets.pictures("stamps")), wallpapers()
    return (
        measure.scenes(stamps[0], walls[::2], count, 0),
        measure.scenes(stamps[1], walls[1::2], count, 1),
    )


def wallpapers() -> list[ImageRecord]:
    """The backgrounds, made small; fetched on first use."""
    folder = cache_folder() / "learning" / "wallpapers"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder_beside(folder) as temporary:
            unpack_debian(cached_debian(WALLPAPERS), temporary / "package")
            (temporary / "small").mkdir()
            for name in _WALLPAPERS_FOLDERS:
                for path in sorted((temporary / "package/usr/share/backgrounds/mate" / name).iterdir()):
                    if not _OTHER_SIZE.search(path.stem):
                        _write_small(path, temporary / "small" / f"{name}-{path.stem}.png")
            move(temporary / "small", folder)
    return _records("wallpapers", folder)


def scene_pictures(count: int) -> list[ImageRecord]:
    """The training scenes as files, without their masks; written on first use."""
    folder = cache_folder() / "learning" / f"scenes-{count}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder_beside(folder) as temporary:
            for number, image_CHW in enumerate(foreground_scenes(count)[0].images):
                cv2.imwrite(str(temporary / f"{number:04d}.png"), image_CHW.transpose(1, 2, 0)[..., ::-1])
            move(temporary, folder)
    return _records("scenes", folder)


def _records(source: str, folder: Path) -> list[ImageRecord]:
    found = []
    for path in sorted(folder.iterdir()):
        header = read_header(path)
        found.append(
            ImageRecord(source, path.name, str(folder), sha256_of(path), header.width, header.height)
        )
    return found


def _write_small(path: Path, target: Path) -> None:
    """A picture whose shorter side is twice that of a scene."""
    pixels = read_rgb(path)
    scale = _WALLPAPER_SIDE / min(pixels.shape[:2])
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(target), small[..., ::-1])
