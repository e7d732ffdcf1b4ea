"""Segmentation, depth and detection on a frozen backbone, and its matches, reach their bars on real pictures.

The backbone is the DINOv2 relative of `python -m orchestrator.data.weights dinov2-focus`. Heads are trained by the
stage `finetune`, in one worker in this process; only Ray is left out. Its step is chosen on validation.

- Segmentation and detection: cut-out stamps at random places over desktop backgrounds, with their true masks. Stamps
  and backgrounds of test are not those of training. Each seed has scenes of its own.
- Depth: 30 frames of a depth camera that moves around a model of a castle, in the order in which it took them: 16 for
  training, 5 for validation, 9 for test. Seeds change crops and the head's first weights.
- Matches: a wall of graffiti from two sides, with its homography. Nothing is trained.

The plain alternative is scikit-learn on the frozen features of the same squares: a logistic regression for each patch,
enlarged to the image; ridge regression of the logarithm of depth; and one box around the largest group of patches that
the logistic regression takes for foreground.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench import _dense_pictures
from bench._torchvision import mend_torchvision
from bench.distil.scenes import wallpapers
from bench.finetune import tuned
from bench.harness import Claim, UnfairError, cpu_seconds, summarize
from bench.learning import measure, sets
from orchestrator import load
from orchestrator.config.dense import DepthData, MaskData, PairData
from orchestrator.data.decode import read_rgb
from orchestrator.data.dense import DensePictures
from orchestrator.data.samples import DebianPackage, cached_debian, unpack_debian
from orchestrator.data.weights import DINOV2_FOCUS, fetch
from orchestrator.evaluation.metric import Features, Figure
from orchestrator.evaluation.metrics.correspondence import Correspondence
from orchestrator.stages.evaluate.config import OutsideModel
from orchestrator.stages.evaluate.towers import dense_maps, outside_tower, pixel_maps
from orchestrator.stages.finetune.config import Finetune
from orchestrator.storage.cache_folder import cache_folder

Floats = NDArray[np.float32]

# GPL-2, and BSD.
DEPTH = DebianPackage(
    "visp-images-data", "3.5.0-1", "8d78de2b5d0ff5536ae5c281b11a5011fd6e95cd717c2e0ebf38bacf57723a9d"
)
GRAFFITI = DebianPackage(
    "opencv-doc", "4.6.0+dfsg-12", "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a"
)
_FRAMES = "usr/share/visp-images-data/ViSP-images/mbt-depth/castel/castel"
_EXAMPLES = "usr/share/doc/opencv-doc/examples/data"
# Of the camera, to a metre.
_DEPTH_SCALE = 8000.0
_TRAIN, _VALIDATION = 16, 21
_SIZE, _PATCH, _VIEW = 112, 14, 448
_MORE_SURE = 0.5


@dataclass(frozen=True)
class Plan:
    """How much is trained: scenes of training and test, updates of each task, and seeds."""

    scenes: int
    test_scenes: int
    steps: Mapping[str, int]
    seeds: int


FULL = Plan(240, 80, {"segmentation": 90, "depth": 90, "detection": 300}, 3)
QUICK = Plan(24, 12, {"segmentation": 2, "depth": 2, "detection": 2}, 1)
_RATES = {"segmentation": 2e-3, "depth": 2e-3, "detection": 1e-3}


def run(quick: bool, seeds: int | None = None, first_seed: int = 1, pictures: Path | None = None) -> Claim:
    """Three seeds of each task; one of a few steps in the quick run, whose figures mean nothing.

    With `pictures`, what the first seed's heads make of test pictures is drawn into that folder.
    """
    mend_torchvision()
    torch.set_num_threads(1)
    plan = QUICK if quick else FULL
    plan = replace(plan, seeds=plan.seeds if seeds is None else seeds)
    weights = cache_folder() / "dinov2-focus"
    fetch(DINOV2_FOCUS, weights)
    found: dict[str, list[float]] = {}
    took: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        frames(root / "frames")
        for seed in range(first_seed, first_seed + plan.seeds):
            scenes(root / f"scenes-{seed}", plan, seed)
            for task, score in {"segmentation": segmentation, "depth": depth, "detection": detection}.items():
                before = cpu_seconds()
                data = root / ("frames" if task == "depth" else f"scenes-{seed}")
                scores = score(plan, weights, data, root / f"{task}-{seed}", seed)
                took.setdefault(task, []).append(cpu_seconds() - before)
                for arm, value in scores.items():
                    found.setdefault(f"{task}: {arm}", []).append(value)
                said = ", ".join(f"{arm} {value:.4f}" for arm, value in scores.items())
                sys.stderr.write(f"seed {seed}, {task}: {said} after {took[task][-1]:.0f} CPU s\n")
            if pictures is not None and seed == first_seed:
                pictures.mkdir(parents=True, exist_ok=True)
                draw(root, seed, pictures)
        matches = correspondence(weights, root / "planes", pictures)
    means = {arm: float(np.mean(values)) for arm, values in found.items()}
    kept = {
        "segmentation above logistic regression": means["segmentation: mean IoU"]
        > means["segmentation: logistic regression"],
        "depth below the mean's error": means["depth: RMSE over the mean's"] < 1,
        "detection above 0": means["detection: mAP"] > 0,
        "matches above raw patches": _number(matches["dinov2-focus"]) > _number(matches["raw patches"]),
    }
    return Claim(
        claim="tasks on a frozen backbone that reach their bar on real pictures",
        figure=float(sum(kept.values())),
        unit=f"of {len(kept)}",
        goal=float(len(kept)),
        limit=float(len(kept)),
        arms={name: summarize(values, took[name.partition(":")[0]]) for name, values in found.items()},
        notes=(
            ", ".join(f"{bar}: {'yes' if holds else 'no'}" for bar, holds in kept.items()),
            "recall of patches within 5 % of the side: "
            + ", ".join(f"{row} {value}" for row, value in matches.items()),
            "a range is over seeds; mAP of the stage's and of pycocotools' code are equal",
        ),
        better="more",
    )


def _number(value: float | Figure) -> float:
    return value.value if isinstance(value, Figure) else value


# --- data ---------------------------------------------------------------------------------------------------------


def frames(root: Path) -> None:
    """The frames of the depth camera as a data set with `images/` and `depth/`, and lists that split them."""
    _make(root, "images", "depth")
    with tempfile.TemporaryDirectory() as place:
        unpack_debian(cached_debian(DEPTH), Path(place))
        for path in sorted((Path(place) / _FRAMES).glob("image_*.pgm")):
            number = path.stem.removeprefix("image_")
            Image.open(path).convert("RGB").save(root / "images" / f"{number}.png")
            raw = (path.parent / f"depth_image_{number}.bin").read_bytes()
            height, width = np.frombuffer(raw[:8], "<u4").tolist()
            depth_HW = np.frombuffer(raw[8:], "<u2").reshape(height, width)
            Image.fromarray(depth_HW).save(root / "depth" / f"{number}.png")
    names = sorted(path.name for path in (root / "images").iterdir())
    parts = {"train": names[:_TRAIN], "validation": names[_TRAIN:_VALIDATION], "test": names[_VALIDATION:]}
    for part, chosen in parts.items():
        (root / f"{part}.txt").write_text("".join(f"images/{name}\n" for name in chosen))


def scenes(root: Path, plan: Plan, seed: int) -> None:
    """Stamps over backgrounds with masks, below `train` and `test`, and their boxes as COCO writes them."""
    stamps, walls = sets.split(sets.pictures("stamps")), wallpapers()
    made = {
        "train": measure.scenes(stamps[0], walls[::2], plan.scenes, 2 * seed),
        "test": measure.scenes(stamps[1], walls[1::2], plan.test_scenes, 2 * seed + 1),
    }
    pictures: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for part, drawn in made.items():
        _make(root, f"images/{part}", f"masks/{part}")
        for number, (image_CHW, mask_HW) in enumerate(zip(drawn.images, drawn.masks, strict=True)):
            name = f"{part}/{number:04}.png"
            Image.fromarray(image_CHW.transpose(1, 2, 0)).save(root / "images" / name)
            Image.fromarray(mask_HW.astype(np.uint8)).save(root / "masks" / name)
            x, y, width, height = cv2.boundingRect(mask_HW.astype(np.uint8))
            side = mask_HW.shape[0]
            pictures.append({"id": len(pictures) + 1, "file_name": name, "width": side, "height": side})
            if width:
                boxes.append(
                    {"id": len(boxes) + 1, "image_id": len(pictures), "category_id": 1, "iscrowd": 0}
                    | {"bbox": [x, y, width, height], "area": width * height}
                )
    document = {"images": pictures, "annotations": boxes, "categories": [{"id": 1, "name": "stamp"}]}
    (root / "boxes.json").write_text(json.dumps(document))


def _make(root: Path, *parts: str) -> None:
    for part in parts:
        (root / part).mkdir(parents=True)


# --- tasks --------------------------------------------------------------------------------------------------------


def segmentation(plan: Plan, weights: Path, data: Path, folder: Path, seed: int) -> dict[str, float]:
    """Mean IoU on test of the stage, and of logistic regression on patches."""
    split = {"by": "folder", "train": "images/train", "test": "images/test", "seed": seed}
    masks = {"path": str(data), "split": split}
    scores = _tuned(plan, "segmentation", {"data": masks}, weights, folder, seed)
    return {
        "mean IoU": scores["test"]["mean_iou"],
        "logistic regression": plain_segmentation(DensePictures(MaskData.model_validate(masks)), weights),
    }


def depth(plan: Plan, weights: Path, data: Path, folder: Path, seed: int) -> dict[str, float]:
    """RMSE on test over that of the mean depth of training; also of ridge regression, and of the mean at each place."""
    split = {"by": "file", **{part: str(data / f"{part}.txt") for part in ("train", "validation", "test")}}
    maps = {"path": str(data), "scale": _DEPTH_SCALE, "max_depth": 2.0, "split": split}
    task = {"data": maps, "nearest": 0.1, "num_bins": 64}
    scores = _tuned(plan, "depth", task, weights, folder, seed)
    plain = plain_depth(DensePictures(DepthData.model_validate(maps)), weights)
    return {
        "RMSE over the mean's": scores["test"]["rmse"] / plain["mean"],
        "ridge regression": plain["ridge"] / plain["mean"],
        "the mean at each place": plain["place"] / plain["mean"],
    }


def detection(plan: Plan, weights: Path, data: Path, folder: Path, seed: int) -> dict[str, float]:
    """mAP on test of the stage, as pycocotools has it too, and of the box around the foreground's patches.

    Raises:
        UnfairError: the stage's mAP is not that of pycocotools.
    """
    split = {"by": "folder", "train": "train", "test": "test", "seed": seed}
    boxes = {"path": str(data / "images"), "annotations": str(data / "boxes.json"), "split": split}
    scores = _tuned(plan, "detection", {"data": boxes, "num_queries": 5}, weights, folder, seed)
    model = load(folder / "out" / "model", trust_module="transformers")
    pictures = sorted((data / "images/test").iterdir())
    found = [
        [(box * measure_side(picture), score) for box, score in zip(one.boxes, one.scores, strict=True)]
        for picture, one in zip(pictures, model.predict_boxes(pictures, least=0.0), strict=True)
    ]
    theirs = coco(data / "boxes.json", pictures, found)
    if abs(theirs["map"] - scores["test"]["map"]) > 1e-4:
        raise UnfairError(f"pycocotools has a mAP of {theirs['map']}, the stage {scores['test']['map']}")
    masks = MaskData.model_validate({"path": str(data)})
    plain = coco(data / "boxes.json", pictures, plain_boxes(DensePictures(masks), weights))
    return {
        "mAP": theirs["map"],
        "mAP at 0.5": theirs["map_50"],
        "foreground's box": plain["map"],
        "foreground's box at 0.5": plain["map_50"],
    }


def correspondence(weights: Path, root: Path, pictures: Path | None = None) -> dict[str, float | Figure]:
    """Recall within 5 % of the side of the graffiti's two views, of the backbone's patches and of raw ones.

    With `pictures`, the matches are drawn into that folder.
    """
    folder = root / "graffiti"
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as place:
        unpack_debian(cached_debian(GRAFFITI), Path(place))
        examples = Path(place) / _EXAMPLES
        for number, name in enumerate(("graf1.png", "graf3.png"), 1):
            Image.open(examples / name).convert("RGB").save(folder / f"{number}.png")
        storage = cv2.FileStorage(str(examples / "H1to3p.xml"), cv2.FILE_STORAGE_READ)
        np.savetxt(folder / "H_1_2", storage.getFirstTopLevelNode().mat())
        storage.release()
    metric = Correspondence(use="correspondence", data=PairData(path=root))
    metric.check()
    source = OutsideModel.model_validate({"transformers": str(weights)})
    tower = outside_tower(source, "dinov2-focus", _VIEW, "dinov2-focus", "cpu")
    nothing = np.zeros((0, 1), dtype=np.float32)
    lookers = {
        "dinov2-focus": partial(dense_maps, tower),
        "raw patches": partial(pixel_maps, patch=_PATCH),
    }
    found: dict[str, float | Figure] = {}
    for name, maps in lookers.items():
        seen = Features(
            name, "bench", nothing, [], [], 0, lambda: nothing, size=_VIEW, maps=maps, patch=_PATCH
        )
        found[name] = metric.measure(seen)["recall_at_0.05"]
        if pictures is not None:
            metric.picture(pictures / f"matches-{name.replace(' ', '-')}.png")
    return found


def draw(root: Path, seed: int, pictures: Path) -> None:
    """Draw what the heads of a seed make of test pictures."""
    scenes_of = DensePictures(MaskData.model_validate({"path": str(root / f"scenes-{seed}")}))
    frames_of = DensePictures(
        DepthData.model_validate({"path": str(root / "frames"), "scale": _DEPTH_SCALE, "max_depth": 2.0})
    )
    for what, task, data in (
        (_dense_pictures.classes, "segmentation", scenes_of),
        (_dense_pictures.depths, "depth", frames_of),
        (_dense_pictures.boxes, "detection", scenes_of),
    ):
        model = root / f"{task}-{seed}" / "out" / "model"
        what(model, data, _rows(data, "test"), pictures / f"{task}.png")


def _tuned(
    plan: Plan, kind: str, task: Mapping[str, Any], weights: Path, folder: Path, seed: int
) -> dict[str, Any]:
    steps = plan.steps[kind]
    schedule = {"peak": _RATES[kind], "warmup_steps": steps // 10, "shape": "cosine"}
    stage = Finetune.model_validate(
        {
            "kind": "finetune",
            "task": {"type": kind, **task},
            "network": {"transformers": str(weights)},
            "mode": "frozen",
            "steps": steps,
            "batch_size": 16 if kind != "depth" else 8,
            "block_size": 4,
            "image_size": _SIZE,
            "validate_every": max(1, steps // 3),
            "optimizer": {"lr": schedule, "weight_decay": 0.001, "clip_norm": 1.0},
        }
    )
    return tuned(stage, None, folder, seed)


# --- the plain alternative ----------------------------------------------------------------------------------------


def patch_maps(squares: NDArray[np.uint8], weights: Path) -> Floats:
    """Features (N, h, w, D) of the frozen backbone's patches."""
    tower = outside_tower(
        OutsideModel.model_validate({"transformers": str(weights)}),
        "dinov2-focus",
        _SIZE,
        "dinov2-focus",
        "cpu",
    )
    return np.asarray(dense_maps(tower, squares), dtype=np.float32)


def _rows(pictures: DensePictures, part: str) -> list[int]:
    """The rows below `images/PART`, or those of the list of frames."""
    index = pictures.index()
    paths = [index[row].path for row in range(len(index))]
    frames = {"train": range(_TRAIN), "test": range(_VALIDATION, len(paths))}
    named = [row for row, path in enumerate(paths) if path.startswith(f"images/{part}/")]
    return named or list(frames[part])


def _squares(pictures: DensePictures, part: str) -> tuple[NDArray[np.uint8], list[NDArray[Any]]]:
    found = list(pictures.squares(_rows(pictures, part), _SIZE))
    return np.stack([image for image, _ in found]), [target for _, target in found]


def foreground(pictures: DensePictures, weights: Path) -> tuple[Floats, list[NDArray[Any]]]:
    """The probability of foreground for each patch of the test scenes (N, h, w), and their masks."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    images, masks = _squares(pictures, "train")
    maps = patch_maps(images, weights)
    side, dim = maps.shape[1], maps.shape[-1]
    shares = np.stack(
        [cv2.resize((m == 1).astype(np.float32), (side, side), interpolation=cv2.INTER_AREA) for m in masks]
    )
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=1000))
    probe.fit(maps.reshape(-1, dim), shares.reshape(-1) > _MORE_SURE)
    images, masks = _squares(pictures, "test")
    maps = patch_maps(images, weights)
    return probe.predict_proba(maps.reshape(-1, dim))[:, 1].reshape(maps.shape[:3]), masks


def plain_segmentation(pictures: DensePictures, weights: Path) -> float:
    """Mean IoU of foreground and background, over all pixels of the test scenes."""
    shares, masks = foreground(pictures, weights)
    counts = np.zeros((2, 2))
    for share_hw, mask_HW in zip(shares, masks, strict=True):
        said = cv2.resize(share_hw, mask_HW.shape[::-1], interpolation=cv2.INTER_LINEAR) > _MORE_SURE
        for which in (0, 1):
            ours, true = said == which, mask_HW == which
            counts[which] += (ours & true).sum(), (ours | true).sum()
    return float((counts[:, 0] / counts[:, 1]).mean())


def plain_depth(pictures: DensePictures, weights: Path) -> dict[str, float]:
    """RMSE in metres on test, the mean over pictures: of ridge regression on patches and of two means of training."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    images, depths = _squares(pictures, "train")
    maps = patch_maps(images, weights)
    side, dim = maps.shape[1], maps.shape[-1]
    small = np.stack([cv2.resize(one, (side, side), interpolation=cv2.INTER_NEAREST) for one in depths])
    known = small.reshape(-1) > 0
    ridge = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(0, 5, 11)))
    ridge.fit(maps.reshape(-1, dim)[known], np.log(small.reshape(-1)[known]))
    stack = np.stack(depths)
    mean = float(stack[stack > 0].mean())
    seen = np.maximum((stack > 0).sum(0), 1)
    place = np.where((stack > 0).any(0), stack.sum(0) / seen, mean)
    images, depths = _squares(pictures, "test")
    said = np.exp(ridge.predict(patch_maps(images, weights).reshape(-1, dim))).reshape(-1, side, side)
    errors: dict[str, list[float]] = {"ridge": [], "mean": [], "place": []}
    for small_hw, true in zip(said.astype(np.float32), depths, strict=True):
        large = cv2.resize(small_hw, true.shape[::-1], interpolation=cv2.INTER_LINEAR)
        valid = true > 0
        for name, guess in {"ridge": large, "mean": np.full_like(true, mean), "place": place}.items():
            errors[name].append(float(np.sqrt(((guess - true)[valid] ** 2).mean())))
    return {name: float(np.mean(values)) for name, values in errors.items()}


def plain_boxes(pictures: DensePictures, weights: Path) -> list[list[tuple[NDArray[Any], float]]]:
    """One box around the largest group of foreground patches of each test scene, in pixels of the scene."""
    found: list[list[tuple[NDArray[Any], float]]] = []
    for share_hw, mask_HW in zip(*foreground(pictures, weights), strict=True):
        said = (share_hw > _MORE_SURE).astype(np.uint8)
        number, labels, stats, _ = cv2.connectedComponentsWithStats(said)
        if number == 1:
            found.append([])
            continue
        largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
        x, y, width, height = stats[largest, :4]
        scale = mask_HW.shape[0] / len(share_hw)
        box = np.array([x, y, x + width, y + height]) * scale
        found.append([(box, float(share_hw[labels == largest].mean()))])
    return found


def measure_side(picture: Path) -> int:
    """The side of a scene in pixels."""
    return int(read_rgb(picture).shape[0])


def coco(
    annotations: Path, pictures: Sequence[Path], found: Sequence[Sequence[tuple[NDArray[Any], float]]]
) -> dict[str, float]:
    """mAP and mAP at an overlap of 0.5 by pycocotools, of boxes as left, top, right and bottom in pixels."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(annotations))
        ids = {picture["file_name"]: picture["id"] for picture in known.dataset["images"]}
        asked = [ids[f"{path.parent.name}/{path.name}"] for path in pictures]
        results = [
            {"image_id": number, "category_id": 1, "score": score}
            | {"bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
            for number, boxes in zip(asked, found, strict=True)
            for box, score in boxes
        ]
        if not results:
            return {"map": 0.0, "map_50": 0.0}
        judge = COCOeval(known, known.loadRes(results), "bbox")
        judge.params.imgIds = asked
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {"map": float(judge.stats[0]), "map_50": float(judge.stats[1])}
