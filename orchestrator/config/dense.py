"""Data sets of pictures with something for every pixel: a class or a distance; and pairs of pictures of one plane."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from orchestrator.config.schema import LocalPath
from orchestrator.config.settings import Settings, in_key_if_set
from orchestrator.config.split import Split
from orchestrator.errors import KeyMistakeError, UserError, nearest, shortened

# The official split of NYUv2, beside its file.
NYUV2_SPLITS = "splits.mat"
_PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True)
class Layout:
    """Where a known data set has its parts.

    Attributes:
        images, targets: folders below the set's.
        image_end, target_end: what follows the common part of a picture's and its target's name.
        splits: the folders of train and test, below `images`.
        ignore: the value of pixels that do not count.
    """

    images: str
    targets: str
    image_end: str
    target_end: str
    splits: tuple[str, str] | None
    ignore: int


LAYOUTS: Mapping[str, Layout] = {
    "folders": Layout("images", "masks", "", ".png", None, 255),
    "ade20k": Layout("images", "annotations", "", ".png", ("training", "validation"), 0),
    "cityscapes": Layout(
        "leftImg8bit", "gtFine", "_leftImg8bit.png", "_gtFine_labelTrainIds.png", ("train", "val"), 255
    ),
}


class MaskData(Settings):
    """Pictures with masks: PNGs of the same size, whose pixels are numbers of classes.

    A mask has the name of its picture, or a manifest says which it is.
    """

    path: LocalPath = Field(description="The folder of the dataset.")
    manifest: LocalPath | None = Field(
        None,
        description="A table that names pictures and masks in the columns `path` and `mask`, relative to the dataset's "
        "`path`: CSV, JSON lines or Parquet. Pictures without a mask are left out. Default: `layout` says where they "
        "are.",
    )
    layout: Literal["folders", "ade20k", "cityscapes"] = Field(
        "folders",
        description="Where pictures and masks are. folders: `images/` and `masks/`. ade20k: `images/` and "
        "`annotations/`, each with `training/` and `validation/`. cityscapes: `leftImg8bit/` and `gtFine/` with "
        "`train/` and `val/`; the names of masks end in `_gtFine_labelTrainIds.png`.",
    )
    ignore: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="The value of a mask's pixels that do not count. Default: 255, or 0 with `ade20k`.",
    )
    split: Split | None = Field(
        None,
        description="How the pictures are split. Default: they are split by the layout's own folders, with a part of "
        "train for validation, or by hash with `folders` or a manifest.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> MaskData:
        if self.manifest is not None and self.layout != "folders":
            raise KeyMistakeError(
                "`manifest` and `layout` both say where masks are", key="layout", hint="leave one of them out"
            )
        return self

    @property
    def ignored(self) -> int:
        """The number of pixels that do not count."""
        return LAYOUTS[self.layout].ignore if self.ignore is None else self.ignore

    def pairs(self) -> list[tuple[str, str]]:
        """Paths of pictures and masks below `path` by the layout; raises as :func:`paired`."""
        return paired(self.path, LAYOUTS[self.layout], "mask")

    def chosen_split(self) -> Split:
        """`split`, or that of the layout."""
        if self.split is not None:
            return self.split
        layout = LAYOUTS[self.layout]
        if layout.splits is None:
            return Split.model_validate({"by": "hash"})
        train, test = (f"{layout.images}/{part}" for part in layout.splits)
        return Split.model_validate({"by": "folder", "train": train, "test": test})


class DepthData(Settings):
    """Pictures with depth maps: 16-bit PNGs of the pictures' sizes and names. 0 marks a pixel without depth."""

    path: LocalPath = Field(
        description="The folder of the dataset, with `images/` and `depth/`, or the .mat file with `nyuv2`."
    )
    layout: Literal["folders", "nyuv2"] = in_key_if_set(
        "folders",
        description="Where pictures and depth are. folders: `images/` and `depth/`. nyuv2: NYUv2's "
        "`nyu_depth_v2_labeled.mat`, with its `splits.mat` beside it if there is one.",
    )
    scale: float = Field(
        1000.0,
        gt=0,
        description="The value of a depth map that is one metre: 1000 for millimetres, as of most depth cameras, or "
        "256 for KITTI. It is not used with `nyuv2`.",
    )
    max_depth: float = Field(
        10.0,
        gt=0,
        description="The maximum depth, in metres, such as 10 indoors or 80 for streets. Pixels beyond it do not "
        "count.",
    )
    split: Split | None = Field(
        None,
        description="How the pictures are split. Default: they are split by hash, or with `nyuv2` as its `splits.mat` "
        "says, with a part of train for validation.",
    )

    def pairs(self) -> list[tuple[str, str]]:
        """Paths of pictures and depth maps below `path`; raises as :func:`paired`. Of a single file they are none."""
        if self.layout == "nyuv2":
            return []
        return paired(self.path, Layout("images", "depth", "", ".png", None, 0), "depth map")

    def chosen_split(self) -> Split:
        """`split`, or that of the layout."""
        if self.split is not None:
            return self.split
        if self.layout == "nyuv2" and self.path.with_name(NYUV2_SPLITS).is_file():
            return Split.model_validate({"by": "folder", "train": "images/train", "test": "images/test"})
        return Split.model_validate({"by": "hash"})

    def in_key(self, what: str) -> dict[str, tuple[Path, ...]]:
        """What is part of a stage's key, see :func:`in_key`.

        Raises:
            UserError: as :func:`paired`.
        """
        found = in_key(self.path, self.pairs(), self.split, what)
        if self.layout == "nyuv2":
            splits = self.path.with_name(NYUV2_SPLITS)
            found[what] = (self.path, *([splits] if splits.is_file() else []))
        return found


class PairData(Settings):
    """Views of planes: one folder a plane, as in HPatches. `1.ppm` is the first view; `H_1_2` maps it to `2.ppm`."""

    path: LocalPath = Field(description="The folder of the dataset, with a folder for each plane.")

    def pairs(self) -> list[tuple[str, str, str]]:
        """First view, other view and file of the homography, for each pair, as paths below `path`.

        Raises:
            UserError: there are none, or a file of a pair is missing.
        """
        found = []
        for matrix in sorted(self.path.glob("*/H_1_*")):
            number = matrix.name.rpartition("_")[2]
            views = [_view(matrix.parent, one) for one in ("1", number)]
            for one, view in zip(("1", number), views, strict=True):
                if view is None:
                    raise UserError(
                        f"{matrix.parent.name}/{matrix.name} has no view {one}",
                        where=str(matrix.parent),
                        hint=f"put {one}.ppm, .png or .jpg beside it, or remove {matrix.name}",
                    )
            first, other = (str(view.relative_to(self.path)) for view in views if view is not None)
            found.append((first, other, str(matrix.relative_to(self.path))))
        if not found:
            raise UserError(
                f"there are no pairs of views in {self.path}",
                where=str(self.path),
                hint="each plane is a folder with 1.ppm, 2.ppm, … and homographies H_1_2, … as in HPatches",
            )
        return found


def _view(folder: Path, number: str) -> Path | None:
    return next(
        (path for end in (".ppm", ".png", ".jpg", ".jpeg") if (path := folder / f"{number}{end}").is_file()),
        None,
    )


def paired(root: Path, layout: Layout, what: str) -> list[tuple[str, str]]:
    """Paths of pictures and their targets below `root`, by the pictures' names.

    Args:
        root: the folder of the data set.
        layout: where its parts are.
        what: a target is called, for messages.

    Raises:
        UserError: a folder is missing or empty, or a picture or a target has no partner.
    """
    parts = {}
    for folder, end in ((layout.images, layout.image_end), (layout.targets, layout.target_end)):
        if not (root / folder).is_dir():
            there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
            close = nearest(folder, there)
            raise UserError(
                f"the data set {root} has no folder {folder!r}",
                where=str(root),
                hint=f"did you mean {close!r}? Name it {folder!r}"
                if close
                else "see `layout` for what it needs",
            )
        parts[folder] = _by_stem(root / folder, end)
    images, targets = parts[layout.images], parts[layout.targets]
    if not images:
        raise UserError(
            f"there are no pictures in {root / layout.images}",
            where=str(root / layout.images),
            hint=f"their names end in {layout.image_end or ', '.join(sorted(_PICTURES))}",
        )
    for ours, theirs, have, lack in ((images, targets, "picture", what), (targets, images, what, "picture")):
        alone = sorted(set(ours) - set(theirs))
        if alone:
            number = f"1 {have} has" if len(alone) == 1 else f"{len(alone):,} {have}s have"
            shown = shortened(", ".join(ours[stem] for stem in alone[:3]), 300)
            raise UserError(
                f"{number} no {lack}, such as {shown}",
                where=str(root),
                hint=f"a {what} lies in {layout.targets}/ under the same folders and name as its picture in "
                f"{layout.images}/, and ends in {layout.target_end}",
            )
    return [
        (f"{layout.images}/{images[stem]}", f"{layout.targets}/{targets[stem]}") for stem in sorted(images)
    ]


def in_key(
    root: Path, pairs: Sequence[tuple[str, str]], split: Split | None, what: str
) -> dict[str, tuple[Path, ...]]:
    """What of a data set is part of a stage's key, as for `Stage.files`: what its files hold, and what splits them.

    Their names are, too, as a field without files: a split by folders or lists goes by them.

    Args:
        root: the folder of the data set.
        pairs: of :func:`paired`; a target that is not below `root` has a name of its content.
        split: the field of the data set.
        what: the field that has its files.
    """
    # Where the cache of a machine is says nothing of the data.
    named = [Path(part).name if Path(part).is_absolute() else part for pair in pairs for part in pair]
    names = hashlib.sha256("\0".join(named).encode("utf-8", "surrogateescape"))
    files = {what: tuple(root / part for pair in pairs for part in pair)}
    by = {
        f"data.split.{field}": paths for field, paths in (split.files() if split is not None else {}).items()
    }
    return {**files, f"{what}.names {names.hexdigest()[:16]}": (), **by}


def _by_stem(folder: Path, end: str) -> dict[str, str]:
    """Paths below a folder by what pictures and targets have in common of them."""
    found = {}
    names: Iterable[str] = (
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.name.startswith(".") and path.suffix.lower() in _PICTURES and path.is_file()
    )
    stems = Counter[str]()
    for name in sorted(names):
        if end and not name.endswith(end):
            continue
        stem = name.removesuffix(end) if end else str(Path(name).with_suffix(""))
        stems[stem] += 1
        found[stem] = name
    twice = next((stem for stem, count in stems.items() if count > 1), None)
    if twice is not None:
        raise UserError(
            f"there are {stems[twice]} pictures called {twice} in {folder}",
            where=str(folder),
            hint="give them names that differ in more than their endings",
        )
    return found
