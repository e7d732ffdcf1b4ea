"""Evaluation by texts: zero-shot classes, and the words that are looked for in photos."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.data.index import ImageIndex
from orchestrator.evaluation.metric import Figure
from orchestrator.evaluation.metrics.bootstrap import mean
from orchestrator.stages.base import Context
from orchestrator.stages.evaluate import text as evaluate_text
from orchestrator.stages.evaluate.shown import largest_groups
from orchestrator.stages.evaluate.text import TextEvaluation

from .evaluating import (
    SIZE,
    one_thread,
    small,
)

__all__ = ["one_thread", "small"]


class Hues:
    """Photos and texts in the space of colours: what a perfect pair of towers would do with "red" and so on.

    "not red" is green, so that a template can turn the classes round.
    """

    dim = 3
    image_size = SIZE
    names = ("red", "green", "blue")

    def embed_images(self, images: list[np.ndarray]) -> np.ndarray:
        found = np.stack([image.mean(axis=(0, 1)) for image in images]).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def embed_patches(self, images: list[np.ndarray], size: int) -> list[np.ndarray]:
        assert {image.shape for image in images} == {(size, size, 3)}
        halves = [[image[:, : size // 2], image[:, size // 2 :]] for image in images]
        return [self.embed_images(pair)[None] for pair in halves]

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        at = [(self.names.index(text.split()[-1]) + text.startswith("not")) % 3 for text in texts]
        return np.eye(3, dtype=np.float32)[at]

    def embed_names(self, names: list[str], templates: list[str] = ("{}",)) -> np.ndarray:
        return sum(self.embed_texts([item.replace("{}", name) for name in names]) for item in templates)


def test_classes_are_told_by_the_nearest_text(small: Context) -> None:
    index = ImageIndex.load(small.inputs["index"].path)
    texts = TextEvaluation(Hues(), index, batch=4, check=lambda: None)  # type: ignore[arg-type]
    groups = largest_groups(index.labels, 10)
    found = texts.zero_shot(groups, ["{}", "a photo of {}", "not {}"])
    assert found is not None
    by_template = {name: one.value for name, one in found.by_template.items()}
    assert by_template == {"{}": 1.0, "a photo of {}": 1.0, "not {}": 0.0}
    # Two of three templates are right.
    assert found.accuracy == Figure(1.0, 1.0, 1.0, "all", 14)
    assert (found.num_photos, found.num_classes, found.majority.value) == (14, 3, pytest.approx(6 / 14))
    assert found.majority == mean(
        np.array([label == "red" for label in index.labels if label in groups]), "all", 0
    )
    assert texts.zero_shot({}, ["{}"]) is None


def test_labels_are_read_once_for_all_photos(small: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ImageIndex.load(small.inputs["index"].path)
    groups, labels = largest_groups(index.labels, 10), index.labels
    asked: list[int] = []
    monkeypatch.setattr(ImageIndex, "labels", property(lambda self: asked.append(0) or labels))
    texts = TextEvaluation(Hues(), index, batch=4, check=lambda: None)  # type: ignore[arg-type]
    assert texts.zero_shot(groups, ["{}"]) is not None
    assert len(asked) == 1, "each time is a list of all of them"


def test_texts_are_looked_for_in_the_photos(small: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ImageIndex.load(small.inputs["index"].path)
    drawn: list[tuple[list[np.ndarray], list[str]]] = []
    monkeypatch.setattr(
        evaluate_text, "text_maps", lambda photos, maps, prompts, path: drawn.append((maps, prompts))
    )
    texts = TextEvaluation(Hues(), index, batch=4, check=lambda: None)  # type: ignore[arg-type]
    assert texts.maps([0, 6], ["green", "some red"], small.out / "maps.png")
    (maps, prompts) = drawn.pop()
    assert prompts == ["green", "some red"]
    assert [item.shape for item in maps] == [(1, 2, 2)] * 2
    assert (maps[0][..., 1] > maps[0][..., 0]).all()
    assert (maps[1][..., 0] > maps[1][..., 1]).all()
    monkeypatch.setattr(
        Hues, "embed_texts", lambda self, texts: np.eye(3, dtype=np.float32)[[0] * len(texts)]
    )
    assert texts.maps([0, 6, 0], [], small.out / "maps.png")
    assert drawn.pop()[1] == ["red 0", "green 0"]
