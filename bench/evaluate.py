"""The k-NN of evaluate gives scikit-learn's results in no more processor time; metrics of real pictures beside it.

The timed arms get equal features: k-NN by cosine of as many queries as the bank has pictures, with DINO's weights,
by us and by scikit-learn's `KNeighborsClassifier`. They must agree on at least 99.9 % of the labels: equal
similarities may be broken differently.

The notes have what metrics give of real pictures, with 95 % intervals: linear segmentation of cut-out stamps over
wallpapers with their true masks, and correspondence on food photos and what a moved camera would see of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

from bench._torchvision import mend_torchvision
from bench.distil.scenes import wallpapers
from bench.harness import Claim, UnfairError, cpu_seconds, interleave
from bench.learning import sets
from orchestrator.config.dense import MaskData, PairData
from orchestrator.data.decode import read_rgb, square
from orchestrator.data.rng import generator
from orchestrator.evaluation.metric import Features, Figure, Metric
from orchestrator.evaluation.metrics.correspondence import Correspondence
from orchestrator.evaluation.metrics.knn import nearest
from orchestrator.evaluation.metrics.segmentation import LinearSegmentation
from orchestrator.models import build
from orchestrator.stages.evaluate.config import OutsideModel
from orchestrator.stages.evaluate.towers import Tower, dense_maps, outside_tower, pixel_maps
from orchestrator.storage.cache_folder import cache_folder

_DIM, _LABELS, _K, _TEMPERATURE = 384, 100, 20, 0.07
# Patches of 14 and of 8 fill it, and networks of a stride of 32.
_SIDE = 224
# Of the raw pixels.
_PATCH = 14
_AGREE = 0.999


def run(quick: bool) -> Claim:
    """Twenty thousand pictures, 4,000 in the quick run; three repetitions of each arm."""
    features, labels = _clusters(4_000 if quick else 20_000)
    half = len(features) // 2
    found: dict[str, NDArray[np.int64]] = {}

    def ours() -> float:
        before = cpu_seconds()
        near = nearest(features[:half], features[half:], _K)
        found["ours"] = near.vote(labels[:half], _K, _TEMPERATURE)
        return cpu_seconds() - before

    def theirs() -> float:
        before = cpu_seconds()
        voters = KNeighborsClassifier(
            _K,
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: np.exp((1 - distance) / _TEMPERATURE),
        )
        found["theirs"] = voters.fit(features[:half], labels[:half]).predict(features[half:])
        return cpu_seconds() - before

    with threadpool_limits(1):
        arms = interleave({"ours": ours, "scikit-learn": theirs}, 3)
    agree = float((found["ours"] == found["theirs"]).mean())
    if agree < _AGREE:
        raise UnfairError(f"the arms agree on {agree:.2%} of the labels")
    return Claim(
        claim="processor time of k-NN, over that of scikit-learn with equal results",
        figure=arms["ours"].median / arms["scikit-learn"].median,
        unit="of 1",
        goal=1.0,
        limit=None,
        arms=arms,
        notes=(
            f"arms are processor seconds; {half:,} queries among {half:,} pictures of {_DIM} numbers, one thread; "
            f"labels agree on {agree:.2%}",
            *_real(120 if quick else 400, 12 if quick else 40),
        ),
    )


def _clusters(count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features with labels that a vote tells apart, but not all of them."""
    rng = generator(0, "bench evaluate")
    labels = rng.integers(_LABELS, size=count)
    centres = rng.normal(size=(_LABELS, _DIM))
    features = centres[labels] + 3 * rng.normal(size=(count, _DIM))
    return features.astype(np.float32), labels.astype(np.int64)


def _real(num_scenes: int, num_pairs: int) -> Iterator[str]:
    """A line for each metric of real pictures, with the figure of each model."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _compose(root / "scenes", num_scenes)
        _move(root / "planes", num_pairs)
        metrics: dict[str, Metric] = {
            "mean_iou": LinearSegmentation(use="linear_segmentation", data=MaskData(path=root / "scenes")),
            "recall_at_0.05": Correspondence(use="correspondence", data=PairData(path=root / "planes")),
        }
        lookers = _models()
        for name, metric in metrics.items():
            metric.check()
            rows: dict[str, Figure | float] = {}
            floor = metric.floor(next(iter(lookers.values())))
            if floor is not None:
                rows[floor[0]] = floor[1][name]
            for model, seen in lookers.items():
                rows[model] = metric.measure(seen)[name]
            first = next(iter(rows.values()))
            of = f"{first.split}, n={first.num}" if isinstance(first, Figure) else ""
            yield f"{metric.title}, {name} ({of}): " + ", ".join(
                f"{row} {value}" for row, value in rows.items()
            )


def _models() -> Mapping[str, Features]:
    """Raw patches, random weights, and the trained models that `bench distil` has fetched, as far as it has."""
    torch.manual_seed(0)
    found = {
        "raw patches": _features("raw patches", partial(pixel_maps, patch=_PATCH), _PATCH),
        "random vit_nano": _of(Tower(build("vit_nano").eval(), "vit_nano", _SIDE)),
    }
    lite0, focus = cache_folder() / "lite0" / "efficientnet-lite0.pth", cache_folder() / "dinov2-focus"
    outside = {
        "lite0": {
            "module": "orchestrator.models.efficientnet:lite0",
            "weights": lite0,
            "mean": [0.498] * 3,
            "std": [0.502] * 3,
        },
        "dinov2-focus": {"transformers": str(focus)},
    }
    for name, path in {"lite0": lite0, "dinov2-focus": focus}.items():
        if path.exists():
            mend_torchvision()  # transformers imports one if there is one
            source = OutsideModel.model_validate(outside[name])
            found[name] = _of(outside_tower(source, name, _SIDE, name, "cpu"))
    return found


def _of(tower: Tower) -> Features:
    return _features(tower.preset, partial(dense_maps, tower), tower.patch)


def _features(name: str, maps: partial[NDArray[np.float32]], patch: int) -> Features:
    nothing = np.zeros((0, 1), dtype=np.float32)
    return Features(name, "bench", nothing, [], [], 0, lambda: nothing, size=_SIDE, maps=maps, patch=patch)


def _compose(root: Path, count: int) -> None:
    """Cut-outs over wallpapers, with their true masks."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    walls = [square(read_rgb(Path(row.root) / row.path, 2 * _SIDE), 2 * _SIDE) for row in wallpapers()]
    rng = generator(0, "scenes")
    made = 0
    for row in sets.pictures("stamps"):
        alpha = sets.mask_of(row)
        if alpha is None or made == count:
            continue
        wall = walls[int(rng.integers(len(walls)))]
        top, left = rng.integers(_SIDE, size=2)
        behind = wall[top : top + _SIDE, left : left + _SIDE]
        stamp = cv2.resize(read_rgb(Path(row.root) / row.path), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
        share = cv2.resize(alpha, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)[..., None] / 255
        # The stamp lies on white already: what is half transparent keeps some of it.
        scene = share * stamp + (1 - share) * behind
        Image.fromarray(scene.round().astype(np.uint8)).save(root / "images" / f"{made}.png")
        Image.fromarray((share[..., 0] > 0.5).astype(np.uint8)).save(root / "masks" / f"{made}.png")
        made += 1


def _move(root: Path, count: int) -> None:
    """Food photos, and each as a camera sees it that moved; laid out as HPatches is."""
    for at, row in enumerate(sets.pictures("food")[:count]):
        photo = read_rgb(Path(row.root) / row.path)
        height, width = photo.shape[:2]
        rng = generator(0, "planes", at)
        corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float32)
        moved = corners + rng.uniform(-0.15, 0.15, (4, 2)).astype(np.float32) * min(height, width)
        matrix = cv2.getPerspectiveTransform(corners, moved.astype(np.float32))
        # Another exposure: equal colours are not enough to be found.
        seen = cv2.warpPerspective(photo, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)
        brighter = np.clip(seen * rng.uniform(0.7, 1.3), 0, 255).astype(np.uint8)
        folder = root / f"{at:03}"
        folder.mkdir(parents=True)
        Image.fromarray(photo).save(folder / "1.png")
        Image.fromarray(brighter).save(folder / "2.png")
        np.savetxt(folder / "H_1_2", matrix)
