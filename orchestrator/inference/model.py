"""A finished model in Python: loaded from a folder or the registry, asked for features and vectors of images."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.pixels import PixelFormat
from orchestrator.errors import UserError, first_line, printable, shortened
from orchestrator.inference.images import ImageLike, default_loaders, squares_of
from orchestrator.inference.reference import SPELLINGS, inner_folder, locate

if TYPE_CHECKING:
    # torch takes seconds to import, and a plan needs none of it.
    from orchestrator.models import Backbone
    from orchestrator.models.wrapped_backbone import WrappedBackbone
    from orchestrator.stages.common.aligned import Aligned
    from orchestrator.stages.common.predictor import Predictor

Floats = NDArray[np.float32]

# Pixels a side of what a model sees: beyond any.
_MAX_SIDE = 2**14


class ImageFeatures(NamedTuple):
    """What a backbone says of N images, after its final norm, not normalised to a length.

    Attributes:
        cls: float32 (N, D), a vector an image.
        patches: float32 (N, P, D), a vector a patch, row by row over `grid`.
        grid: rows and columns of patches: `patches[0].reshape(*grid, -1)` is the map of the first image.
    """

    cls: Floats
    patches: Floats
    grid: tuple[int, int]


class Predictions(NamedTuple):
    """What a fine-tuned model says of N images.

    Attributes:
        labels: the likeliest class of each.
        probabilities: float32 (N, C), in the order of `classes`; each row adds up to 1.
        classes: the names of the C classes.
    """

    labels: list[str]
    probabilities: Floats
    classes: tuple[str, ...]


class FoundObjects(NamedTuple):
    """What a model for detection found in an image.

    Attributes:
        labels: the class of each object, the surest first.
        scores: float32 (N,), from 0 to 1.
        boxes: float32 (N, 4): left, top, right and bottom in shares of the square that the model sees.
    """

    labels: list[str]
    scores: Floats
    boxes: Floats


@dataclass(frozen=True)
class Model:
    """A trained model to embed with, and to predict with if it was fine-tuned.

    Attributes:
        module: a torch module in eval mode, or a vision and a text tower in one space.
        image_size: pixels a side that it was trained for; None where that is not known.
        pixels: how it saw the values of files in training, if not as 8-bit RGB.
        predictor: the head of a fine-tuned model.
    """

    module: Backbone | WrappedBackbone | Aligned
    image_size: int | None = None
    pixels: PixelFormat | None = None
    predictor: Predictor | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that a fine-tuned model tells apart; none of another."""
        return self.predictor.classes if self.predictor is not None else ()

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        size: int | None = None,
        batch: int = 32,
        loaders: int | None = None,
    ) -> Predictions:
        """Classes of images; arguments as of :meth:`features`.

        Raises:
            UserError: the model was not fine-tuned for classification, or as :meth:`features`.
        """
        from orchestrator.inference.forward import probabilities_of

        if self.predictor is None or self.predictor.task != "classification":
            raise UserError(
                "this model has no classes",
                hint="load what a stage of kind finetune made with the task classification",
            )
        size = side_of(self, size)
        check_number("batch", batch, 2**20)
        parts = [np.empty((0, len(self.classes)), np.float32)]
        for squares in squares_of(_several(images), size, batch, checked_loaders(loaders), self.pixels):
            parts.append(probabilities_of(self, squares))
        found = np.concatenate(parts)
        return Predictions([self.classes[at] for at in found.argmax(axis=1)], found, self.classes)

    def predict_maps(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        size: int | None = None,
        batch: int = 8,
        loaders: int | None = None,
    ) -> NDArray[Any]:
        """A value for every pixel of the squares that are seen of images; arguments as of :meth:`features`.

        Returns:
            (N, size, size): of a model for segmentation int64, places in `classes`; of one for depth float32 metres.

        Raises:
            UserError: the model was not fine-tuned for segmentation or depth, or as :meth:`features`.
        """
        from orchestrator.inference.forward import maps_of

        if self.predictor is None or self.predictor.task not in ("segmentation", "depth"):
            raise UserError(
                "this model makes no maps",
                hint="load what a stage of kind finetune made with the task segmentation or depth",
            )
        size = side_of(self, size)
        check_number("batch", batch, 2**20)
        squares = squares_of(_several(images), size, batch, checked_loaders(loaders), self.pixels)
        parts = [maps_of(self, some) for some in squares]
        return np.concatenate(parts) if parts else np.empty((0, size, size), np.float32)

    def predict_boxes(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        least: float = 0.5,
        size: int | None = None,
        batch: int = 8,
        loaders: int | None = None,
    ) -> list[FoundObjects]:
        """Objects in each image, those whose score is at least `least`; other arguments as of :meth:`features`.

        Raises:
            UserError: the model was not fine-tuned for detection, or as :meth:`features`.
        """
        from orchestrator.inference.forward import boxes_of

        if self.predictor is None or self.predictor.task != "detection":
            raise UserError(
                "this model finds no objects",
                hint="load what a stage of kind finetune made with the task detection",
            )
        if isinstance(least, bool) or not isinstance(least, (int, float)) or not 0 <= least <= 1:
            raise UserError(f"least is {shortened(repr(least), 40)}", hint="give a score from 0 to 1")
        size = side_of(self, size)
        check_number("batch", batch, 2**20)
        found = []
        for squares in squares_of(_several(images), size, batch, checked_loaders(loaders), self.pixels):
            for boxes, scores, classes in boxes_of(self, squares):
                order = [at for at in np.argsort(-scores, kind="stable") if scores[at] >= least]
                labels = [self.classes[int(classes[at])] for at in order]
                found.append(FoundObjects(labels, scores[order], boxes[order]))
        return found

    def features(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        size: int | None = None,
        batch: int = 32,
        loaders: int | None = None,
    ) -> ImageFeatures:
        """CLS and patch features of images, computed on the module's device and returned on the CPU.

        Every image is seen as `evaluate` sees it: upright, its shorter side resized to `size`, its centre cropped. So
        all have the same number of patches. Of a model with a text tower, these are its vision tower's features.

        Args:
            images: one image or several: a path, a PIL image, or uint8 RGB (H, W, 3). One counts as N = 1. For a model
                of other than three channels an array has all bands of a file, (H, W, bands).
            size: pixels a side at which images are seen, a multiple of the patch. Default: what the model was trained
                for.
            batch: the number of images in one forward pass.
            loaders: the number of threads that read images. Default: the number of cores, at most 8.

        Raises:
            UserError: a file that is not an image, or a number that cannot be.
        """
        from orchestrator.inference.forward import features_of, tower_of

        photos = _several(images)
        size = side_of(self, size)
        loaders = checked_loaders(loaders)
        check_number("batch", batch, 2**20)
        tower = tower_of(self.module)
        side = size // tower.patch_size
        cls = [np.empty((0, tower.dim), np.float32)]
        patches = [np.empty((0, side * side, tower.dim), np.float32)]
        for squares in squares_of(photos, size, batch, loaders, self.pixels):
            cls_ND, patches_NPD = features_of(tower, squares)
            cls.append(cls_ND)
            patches.append(patches_NPD)
        return ImageFeatures(np.concatenate(cls), np.concatenate(patches), (side, side))


def load(
    model: str | os.PathLike[str], *, tracking: str | None = None, trust_module: str | Sequence[str] = ()
) -> Model:
    """A trained model from a folder or from the registry, on the CPU, in eval mode.

    A registered model is fetched once for each content, into the cache (`$ORCHESTRATOR_CACHE`, by default
    `~/.cache/dinov3-orchestrator`), and compared with its sha256 each time.

    Args:
        model: a folder: what `orchestrator pull` fetched, `model/` or `aligned/` of a stage's artifact, or the artifact
            itself; weights in other layouts that are known (docs/models.md) load as well. Or a registered model:
            `NAME@ALIAS`, `NAME:VERSION`, or `NAME` for its champion, or its newest version if there is none. A `NAME`
            that is also a folder here is the folder; a text with a `/` in it is a path, unless it is MLflow's
            `models:/NAME/VERSION`.
        tracking: the address of the MLflow server or database. Default: `$MLFLOW_TRACKING_URI`, else that of
            `orchestrator pull`.
        trust_module: packages or modules that may be imported if the folder says that its network is made by them,
            such as "my_nets". That runs their code, so by default none is.

    Raises:
        UserError: nothing there, no model that is known, or one that a module makes which is not trusted; the registry
            cannot be reached, or its files are not those that were published.
    """
    trusted = (trust_module,) if isinstance(trust_module, str) else trust_module
    if not isinstance(trusted, (list, tuple)) or not all(isinstance(each, str) for each in trusted):
        what = f"trust_module is {shortened(repr(trust_module), 80)}"
        raise UserError(what, hint='give the name of a package, such as "my_nets"')
    return load_weights(locate(model, tracking).path, trusted)


def load_weights(path: Path, trusted: Sequence[str] = ()) -> Model:
    """The model of a folder or file on this machine; see :func:`load`."""
    from orchestrator.models.convert import load_any
    from orchestrator.models.wrapped_backbone import UntrustedModuleError, is_wrapped, load_wrapped
    from orchestrator.stages.common.aligned import load_aligned
    from orchestrator.stages.common.predictor import load_predictor

    path = inner_folder(path)
    config = path / "config.json"
    try:
        record: Any = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if not isinstance(record, dict):
            raise ValueError(f"{config.name} holds no mapping")
        if "output_dim" in record:
            aligned = load_aligned(path)
            tower = json.loads((path / "tower" / config.name).read_text(encoding="utf-8"))
            return Model(aligned, aligned.image_size, _pixels(tower))
        extra = record.get("extra") or {}
        if not isinstance(extra, dict):
            raise ValueError(f"`extra` of {config.name} is not a mapping")
        size = extra.get("image_size")
        if size is not None:
            check_number("image_size", size, _MAX_SIDE)
        module = load_wrapped(path, trusted) if is_wrapped(path) else load_any(path)
        predictor = load_predictor(path, module.dim) if path.is_dir() else None
        return Model(module, size, _pixels(record), predictor)
    except UntrustedModuleError as error:
        hint = f"if you trust it, give trust_module={error.module.partition('.')[0]!r}"
        raise UserError(str(error), where=str(path), hint=hint) from error
    except Exception as error:
        # Files from anywhere may be anything; what they make json, safetensors or torch raise is of any type.
        raise UserError(
            f"no model can be loaded: {shortened(first_line(printable(error)), 300)}",
            where=str(path),
            hint=f"give {SPELLINGS}",
        ) from error


def _pixels(record: dict[str, Any]) -> PixelFormat | None:
    """How a model saw files, by its config.json.

    Raises:
        ValueError: it says something else of `pixels`.
    """
    told = record.get("pixels")
    return None if told is None else PixelFormat.model_validate(told)


def embed(
    model: Model | Backbone | str | os.PathLike[str],
    images: ImageLike | Sequence[ImageLike] | None = None,
    *,
    texts: Sequence[str] | None = None,
    size: int | None = None,
    batch: int = 32,
    loaders: int | None = None,
) -> Floats:
    """Vectors of length 1 of images, or of texts where the model has a text tower.

    Args:
        model: of :func:`load`, what it takes, or a torch module of `orchestrator.models`.
        images: one image or several: a path, a PIL image, or an array, see :meth:`Model.features`.
        texts: instead of images.
        size: pixels a side at which images are seen. Default: what the model was trained for.
        batch: the number of images in one forward pass.
        loaders: the number of threads that read images. Default: the number of cores, at most 8.

    Returns:
        float32 (N, D), a row each; (D,) of a single image.

    Raises:
        UserError: no such model or file, a file that is not an image, a size that the model cannot take, or texts for a
            model that takes none.
    """
    from orchestrator.inference.forward import image_vectors

    if size is not None:
        check_number("size", size, _MAX_SIDE)
    check_number("batch", batch, 2**20)
    loaders = checked_loaders(loaders)
    loaded = _model(model)
    if (images is None) == (texts is None):
        raise UserError("embed takes either images or texts: give one of them")
    if texts is not None:
        return text_vectors(loaded, texts)
    assert images is not None
    photos = _several(images)
    side = embedding_side(loaded, size)
    parts = [np.empty((0, loaded.module.dim), np.float32)]
    parts += [
        image_vectors(loaded.module, squares)
        for squares in squares_of(photos, side, batch, loaders, loaded.pixels)
    ]
    found = np.concatenate(parts)
    return found if isinstance(images, (list, tuple)) else found[0]


def text_vectors(model: Model, texts: Sequence[str]) -> Floats:
    """Vectors of length 1 of texts, (N, D).

    Raises:
        UserError: the model has no text tower, or these are not texts.
    """
    embed_texts = getattr(model.module, "embed_texts", None)
    if embed_texts is None:
        raise UserError("this model has no text tower", hint="load what a stage of kind align_text made")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UserError("texts is a list of texts", hint='give texts=["a dog", "a cat"]')
    vectors: Floats = embed_texts(list(texts))
    return vectors


def side_of(model: Model, size: int | None) -> int:
    """Pixels a side at which a model sees images: `size`, or what it was trained for.

    Raises:
        UserError: neither is known, or the patch does not divide it.
    """
    if size is not None:
        check_number("size", size, _MAX_SIDE)
    size = size or model.image_size
    patch = model.module.patch_size
    if size is None or size % patch:
        what = f"the model's patches of {patch} pixels do not fill {size} pixels a side"
        raise UserError(
            what if size else "it is not known at which size the model sees images",
            hint=f"give size={max(1, round((size or 224) / patch)) * patch}",
        )
    return size


def embedding_side(model: Model, size: int | None) -> int:
    """As :func:`side_of`, for vectors: a model with a text tower has one size, at which the two were aligned."""
    if hasattr(model.module, "embed_texts") and size not in (None, model.image_size):
        raise UserError(f"this model sees images at {model.image_size} pixels", hint="leave `size` out")
    return side_of(model, size)


def checked_loaders(loaders: int | None) -> int:
    """The number of threads that read images. Raises UserError."""
    if loaders is None:
        return default_loaders()
    check_number("loaders", loaders, 2**10)
    return loaders


def check_number(name: str, value: object, most: int) -> None:
    """Raises UserError unless `value` is a whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UserError(
            f"{name} is {shortened(repr(value), 40)}", hint=f"give a whole number from 1 to {most}"
        )


def _several(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    return list(images) if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]


def _model(model: Model | Backbone | str | os.PathLike[str]) -> Model:
    if isinstance(model, Model):
        return model
    if isinstance(model, (str, os.PathLike)):
        return load(model)
    if not callable(model):
        raise UserError(
            f"this is not a model: {shortened(repr(model), 80)}",
            hint="give what `load` returns, or what it takes",
        )
    return Model(model)
