"""A photograph of ImageNet's size becomes its ten crops in at most 5 ms of a core, and training does not wait for them.

Real JPEGs at three sizes: food photographs as they are (307 x 172), and desktop wallpapers at 500 x 375 and at 12
megapixels. Each becomes 2 crops of 256 and 8 of 112 pixels with the published distortions. The peer is what a user
would write: torch's DataLoader with torchvision's transforms on Pillow's images, which decode at a reduced scale where
they can. Both run on one core, turn about; the figures are processor time, which other programs disturb less. Two more
arms resize photographs to 512 pixels once: when they are not in the cache yet, and when they are.

The notes have the scaling over threads and processes, the share of a step that training waits at laptop size, and how
many cores a GPU needs by this arithmetic.
"""

from __future__ import annotations

import importlib
import itertools
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench._torchvision import mend_torchvision
from bench.distil.scenes import WALLPAPERS
from bench.harness import Arm, Claim, interleave
from orchestrator.data.blocks import Block, CropBlocks
from orchestrator.data.decode import read_header
from orchestrator.data.image_cache import ImageCache
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.resized_images import ResizedImages
from orchestrator.data.sampler import SampleOrder
from orchestrator.data.samples import PICTURES, cached, cached_debian, unpack_debian
from orchestrator.data.views import CropConfig
from orchestrator.fsio import sha256_of
from orchestrator.training.loader import BlockLoader
from orchestrator.training.loader_process import ProcessBlocks

_GOAL_MS = 5.0
_SIZES = {"500 x 375": (500, 375), "4000 x 3000": (4000, 3000)}
_FOOD = "307 x 172"
_IMAGENET = "500 x 375"
_BLOCK = 8
# `cached_side` of the arms that decode once: above what the default crops need, 453.
_SIDE = 512
_CACHE_BYTES = 1 << 40
# A step of a ViT with 2.7 million parameters, 48 images, 2 x 64 and 4 x 32 pixels, on two cores.
_LAPTOP_STEP_S, _LAPTOP_BATCH = 2.3, 48
_LAPTOP = CropConfig(global_size=64, local_size=32, num_local=4)
# Images a second and GPU: published for a ViT-L on an H100; others by the operations of their blocks' weights.
_VIT_L_RATE = 159.0
_PARAMETERS = {"ViT-S": 21.6e6, "ViT-L": 303e6, "7B": 6716e6}
_CORES_OF_A_GPU = 16


@dataclass(frozen=True)
class Photos:
    """Makes the source of blocks of a folder's photographs; it can be pickled.

    `cache` is where they are kept once they are resized; None: they are not.
    """

    folder: Path
    crops: CropConfig
    batch: int
    cache: Path | None = None

    def __call__(self) -> CropBlocks:
        rows = [self._record(file) for file in self.files()]
        order = SampleOrder({"all": np.arange(len(rows))}, batch_size=self.batch, seed=0)
        return CropBlocks(
            ImageIndex(rows), order, lambda step: self.crops,
            patch_size=16, block_size=_BLOCK, seed=0, max_unreadable=0.01,
            resized=None if self.cache is None else ResizedImages(_SIDE, ImageCache(self.cache, _CACHE_BYTES)),
        )  # fmt: skip

    def _record(self, file: Path) -> ImageRecord:
        header = read_header(file)
        return ImageRecord(
            "photos", file.name, str(self.folder), sha256_of(file), header.width, header.height
        )

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


def run(quick: bool) -> Claim:
    """Twelve repetitions of 16 photographs an arm; in the quick run three of 8, and no 12 megapixels."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as made:
        folders = _photographs(Path(made), quick)
        arms: dict[str, Callable[[], float]] = {}
        for name, folder in folders.items():
            arms[f"ours, {name}"] = _ours(folder)
            arms[f"DataLoader, torchvision, {name}"] = _peer(folder)
            if name in _SIZES:
                arms[f"decoded once, not in the cache, {name}"] = _first_epoch(folder, Path(made))
                arms[f"decoded once, in the cache, {name}"] = _ours(
                    folder, Path(made) / f"kept-{folder.name}"
                )
        measured = interleave(arms, 3 if quick else 12)
        scaling = _scaling(folders[_IMAGENET], 4 if quick else 16)
        share = _laptop(folders[_FOOD], 4 if quick else 10)
    ours = {name: measured[f"ours, {name}"] for name in folders}
    peers = {name: measured[f"DataLoader, torchvision, {name}"] for name in folders}
    return Claim(
        claim=(__doc__ or "").splitlines()[0],
        figure=ours[_IMAGENET].median,
        unit="ms of a core an image",
        goal=_GOAL_MS,
        limit=None,
        arms=measured,
        notes=[
            "the peer's time over ours: "
            + ", ".join(f"{name}: {peers[name].median / ours[name].median:.1f}" for name in folders),
            "images a second and core: "
            + ", ".join(f"{name}: {1000 / arm.median:.0f}" for name, arm in ours.items()),
            f"images a second and core with cached_side {_SIDE}: "
            + ", ".join(
                f"{name.removeprefix('decoded once, ')}: {1000 / arm.median:.0f}"
                for name, arm in measured.items()
                if name.startswith("decoded once")
            ),
            f"images a second at {_IMAGENET}: " + ", ".join(f"{who} {rate:.0f}" for who, rate in scaling.items()),
            f"a step of {_LAPTOP_STEP_S} s with {_LAPTOP_BATCH} photos of {_FOOD} waits {share:.2%} of its time",
            *_arithmetic(ours),
        ],
    )  # fmt: skip


def _arithmetic(ours: dict[str, Arm]) -> list[str]:
    lines = []
    for model, parameters in _PARAMETERS.items():
        rate = _VIT_L_RATE * _PARAMETERS["ViT-L"] / parameters
        cores = {name: rate * arm.median / 1000 for name, arm in ours.items()}
        needs = ", ".join(f"{name}: {count:.1f}" for name, count in cores.items())
        lines.append(
            f"{model}, {rate:,.0f} images/s on an H100: cores a GPU {needs}; it has {_CORES_OF_A_GPU}"
        )
    return lines


def _ours(folder: Path, cache: Path | None = None) -> Callable[[], float]:
    """Milliseconds of a core an image, by one thread of the loader; other images and crops each time.

    `cache` has all of the photographs, resized, before the first time.
    """
    photos = Photos(folder, CropConfig(), len(list(folder.iterdir())), cache)
    source, steps = photos(), itertools.count()
    if cache is not None:
        _step_ms(source, 0, photos.batch)
    return lambda: _step_ms(source, next(steps), photos.batch)


def _first_epoch(folder: Path, made: Path) -> Callable[[], float]:
    """The same with a cache that is empty each time."""
    steps, count = itertools.count(), len(list(folder.iterdir()))

    def arm() -> float:
        with tempfile.TemporaryDirectory(dir=made) as empty:
            return _step_ms(Photos(folder, CropConfig(), count, Path(empty))(), next(steps), count)

    return arm


def _step_ms(source: CropBlocks, step: int, count: int) -> float:
    loader = BlockLoader(source, range(count // _BLOCK), 1, 1, 1, _as_it_is)
    before = time.process_time()
    for _ in loader.steps(step, step + 1):
        pass
    return (time.process_time() - before) * 1000 / count


def _as_it_is(block: Block) -> Block:
    return block


def _peer(folder: Path) -> Callable[[], float]:
    """The same for torch's DataLoader; in this process, so that no time goes into starting another."""
    mend_torchvision()
    from torch.utils.data import DataLoader

    dataset: Any = _Published(sorted(folder.iterdir()))
    loader: Any = DataLoader(dataset, batch_size=_BLOCK, shuffle=True, collate_fn=_stacked)

    def arm() -> float:
        before = time.process_time()
        for _ in loader:
            pass
        return (time.process_time() - before) * 1000 / len(dataset)

    return arm


def _stacked(samples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([one for one, _ in samples], 1), torch.stack([other for _, other in samples], 1)


class _Published:
    """The published augmentation by torchvision's transforms, as the papers set it."""

    def __init__(self, files: Sequence[Path]) -> None:
        t: Any = importlib.import_module("torchvision.transforms")
        crops = CropConfig()
        self._files, self._crops = files, crops
        bicubic = t.InterpolationMode.BICUBIC
        colours = [
            t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            t.RandomGrayscale(p=0.2),
        ]

        def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
            steps = [t.RandomResizedCrop(size, scale=scale, interpolation=bicubic), *colours]
            steps.append(t.RandomApply([t.GaussianBlur(9, (0.1, 2.0))], p=blur))
            if solarize:
                steps.append(t.RandomSolarize(threshold=128, p=solarize))
            return t.Compose([*steps, t.PILToTensor()])

        self._globals = [
            view(crops.global_size, crops.global_scale, 1.0, 0.0),
            view(crops.global_size, crops.global_scale, 0.1, 0.2),
        ]
        self._local = view(crops.local_size, crops.local_scale, 0.5, 0.0)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        with Image.open(self._files[number]) as opened:
            side = self._crops.min_side
            opened.draft("RGB", (side, side))
            image = opened.convert("RGB")
        large = torch.stack([view(image) for view in self._globals])
        return large, torch.stack([self._local(image) for _ in range(self._crops.num_local)])


def _scaling(folder: Path, num_steps: int) -> dict[str, float]:
    """Images a second of wall time, by loaders."""
    photos = Photos(folder, CropConfig(), 2 * _BLOCK)
    found = {}
    for count in (1, 2):
        for kind in ("thread", "process"):
            with closing(ProcessBlocks(photos, 2)) as processes:
                processes.start(count if kind == "process" else 0)
                source = processes if kind == "process" else photos()
                loader = BlockLoader(source, range(2), count, count, 2, _as_it_is)
                began = time.perf_counter()
                for _ in loader.steps(0, num_steps):
                    pass
                seconds = time.perf_counter() - began
            found[
                f"{count} {kind}{'es' if kind == 'process' and count > 1 else 's' if count > 1 else ''}"
            ] = num_steps * 2 * _BLOCK / seconds
    return found


def _laptop(folder: Path, num_steps: int) -> float:
    """The share of steps, after the first one, that waits for photographs; the steps multiply matrices on one core."""
    photos = Photos(folder, _LAPTOP, _LAPTOP_BATCH)
    loader = BlockLoader(photos(), range(_LAPTOP_BATCH // _BLOCK), 1, 2, 2, _as_it_is)
    matrix, waited, worked = torch.randn(512, 512), 0.0, 0.0
    for step, _ in loader.steps(0, num_steps):
        began = time.perf_counter()
        while time.perf_counter() - began < _LAPTOP_STEP_S:
            torch.mm(matrix, matrix)
        if step:
            waited, worked = waited + loader.waited_s, worked + time.perf_counter() - began
    return waited / (waited + worked)


def _photographs(folder: Path, quick: bool) -> dict[str, Path]:
    """Folders of JPEGs by size, made of two packages' photographs."""
    count = _BLOCK if quick else 2 * _BLOCK
    made = {_FOOD: folder / "food"}
    made[_FOOD].mkdir()
    with tarfile.open(cached(PICTURES)) as archive:
        names = sorted(name for name in archive.getnames() if name.endswith(".jpeg"))
        for name in names[:: len(names) // 64][: max(count, _LAPTOP_BATCH)]:
            file = archive.extractfile(name)
            assert file is not None
            (made[_FOOD] / Path(name).name).write_bytes(file.read())
    unpack_debian(cached_debian(WALLPAPERS), folder / "package")
    nature = folder / "package/usr/share/backgrounds/mate/nature"
    walls = [path for path in sorted(nature.iterdir()) if path.suffix == ".jpg"]
    for name, (width, height) in _SIZES.items():
        if quick and name != _IMAGENET:
            continue
        made[name] = folder / str(width)
        made[name].mkdir()
        for number in range(count):
            with Image.open(walls[number % len(walls)]) as opened:
                image = opened.convert("RGB")
            # Another corner of the same wallpaper each time.
            scale = max(width / image.width, height / image.height) * (1 + 0.2 * (number // len(walls)))
            image = image.resize(
                (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
            )
            image.crop((0, 0, width, height)).save(made[name] / f"{number:02}.jpg", quality=90)
    return made
