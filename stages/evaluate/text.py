"""What `evaluate` asks of photos and texts in one space: retrieval, zero-shot classes, and where a text is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.bands import shown_rgb
from orchestrator.data.index import ImageIndex
from orchestrator.evaluation.metric import Figure
from orchestrator.evaluation.metrics.bootstrap import mean
from orchestrator.evaluation.metrics.retrieval import chance, retrieval_hits
from orchestrator.evaluation.report.text_maps import text_maps
from orchestrator.stages.common.aligned import Aligned
from orchestrator.stages.evaluate.results import TextRetrieval, ZeroShot
from orchestrator.stages.evaluate.towers import Check, Crops, read_photo

Floats = NDArray[np.float32]

_RECALL_AT = (1, 5, 10)
# Columns of the maps where the user names no prompts.
_MAX_CAPTIONS = 5


class TextEvaluation:
    """Photos and texts of an index, embedded by an aligned pair of towers.

    Args:
        aligned: the towers.
        index: the photos.
        batch: photos in one forward pass.
        check: called now and then; may raise `Stopped`.
        rows: the photos that figures are of, the test photos; default: all.
        seed: of the intervals' draws.
    """

    def __init__(
        self,
        aligned: Aligned,
        index: ImageIndex,
        batch: int,
        check: Check,
        rows: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        self._aligned, self._index, self._batch, self._check = aligned, index, batch, check
        self._rows = range(len(index)) if rows is None else rows
        self._split, self._seed = ("all" if rows is None else "test"), seed
        self._photos: dict[int, Floats] = {}

    def retrieval(self) -> TextRetrieval | None:
        """Recall of captions by photo and of photos by caption, over all photos that have one; None without."""
        rows = [row for row in self._rows if self._index[row].caption]
        if not rows:
            return None
        captions = [str(self._index[row].caption) for row in rows]
        texts: list[Floats] = []
        for start in range(0, len(rows), self._batch):
            self._check()
            texts.append(self._aligned.embed_texts(captions[start : start + self._batch]))
        hits = retrieval_hits(self._embed(rows), np.concatenate(texts), captions, _RECALL_AT)
        return TextRetrieval(
            len(rows),
            {name: self._mean(hits_N) for name, hits_N in hits.items()},
            {k: chance(captions, k) for k in _RECALL_AT},
        )

    def zero_shot(self, groups: Mapping[str, int], templates: Sequence[str]) -> ZeroShot | None:
        """Classes by the text that is nearest; None without labels.

        Args:
            groups: the labels that take part.
            templates: texts in which `{}` stands for a label; their embeddings are averaged.
        """
        if not groups:
            return None
        names = list(groups)
        # All at once: one by one they take long.
        labels = self._index.labels
        rows = [row for row in self._rows if labels[row] in groups]
        is_of_N = np.array([names.index(str(labels[row])) for row in rows])
        photos_ND = self._embed(rows)

        def accuracy(templates: Sequence[str]) -> Figure:
            classes_CD = self._aligned.embed_names(names, templates)
            return self._mean((photos_ND @ classes_CD.T).argmax(axis=1) == is_of_N)

        largest = names.index(max(groups, key=lambda name: groups[name]))
        return ZeroShot(
            num_photos=len(rows),
            num_classes=len(names),
            accuracy=accuracy(templates),
            by_template={template: accuracy([template]) for template in templates},
            majority=self._mean(is_of_N == largest),
        )

    def maps(self, shown: Sequence[int], prompts: Sequence[str], path: Path) -> bool:
        """Draw where in the photos `shown` each prompt is, at twice the size of training.

        Args:
            shown: rows of the index.
            prompts: texts; without any, the captions of the photos themselves.
            path: the PNG to write.

        Returns:
            Whether there was a prompt and hence a picture.
        """
        own = dict.fromkeys(self._index[row].caption for row in shown if self._index[row].caption)
        chosen = list(prompts) or [str(caption) for caption in own][:_MAX_CAPTIONS]
        if not chosen:
            return False
        size = 2 * self._aligned.image_size
        photos = list(Crops(self._index, shown, self._check).at(size))
        texts_TD = self._aligned.embed_texts(chosen)
        maps = [patches_hwD @ texts_TD.T for patches_hwD in self._aligned.embed_patches(photos, size)]
        seen = [shown_rgb(photo, self._index.pixels(row)) for photo, row in zip(photos, shown, strict=True)]
        text_maps(seen, maps, chosen, path)
        return True

    def _mean(self, hits_N: NDArray[np.bool_]) -> Figure:
        return mean(hits_N, self._split, self._seed)

    def _embed(self, rows: Sequence[int]) -> Floats:
        """Photos in the common space, (N, D); each is embedded once, whoever asks for it."""
        missing = [row for row in rows if row not in self._photos]
        for start in range(0, len(missing), self._batch):
            self._check()
            part = missing[start : start + self._batch]
            vectors = self._aligned.embed_images([read_photo(self._index, row) for row in part])
            self._photos |= dict(zip(part, vectors, strict=True))
        return np.stack([self._photos[row] for row in rows])
