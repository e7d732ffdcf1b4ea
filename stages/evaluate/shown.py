"""Which labels and photos an evaluation shows, and their feature maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from orchestrator.data.index import ImageIndex
    from orchestrator.stages.evaluate.towers import Crops, Tower

_Item = TypeVar("_Item")


def largest_groups(labels: Sequence[str | None], num_groups: int) -> dict[str, int]:
    """Label → photos, the largest labels of two photos or more; empty if there are not two such labels."""
    counts = Counter(label for label in labels if label)
    ranked = sorted((pair for pair in counts.items() if pair[1] > 1), key=lambda pair: (-pair[1], pair[0]))
    return dict(ranked[:num_groups]) if len(ranked) > 1 else {}


def pick_photos(labels: Sequence[str | None], groups: Mapping[str, int], count: int) -> list[int]:
    """Rows to show: the first photo of each of the largest groups, then others from all over the index."""
    first = [labels.index(label) for label in groups]
    others = [row for row, _ in spread(list(enumerate(labels)), 2 * count) if row not in first]
    return [*first, *others][:count]


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most `count` items, evenly spread, the last one always among them."""
    count = min(count, len(items))
    return [items[(at + 1) * len(items) // count - 1] for at in range(count)]


def draw_maps(tower: Tower, shown: Crops, index: ImageIndex, path: Path) -> None:
    """PCA maps, see :attr:`Tower.map_size`."""
    from orchestrator.data.bands import shown_rgb
    from orchestrator.evaluation.report.figures import pca_maps
    from orchestrator.stages.evaluate.towers import feature_maps

    photos = shown.at(tower.map_size)
    captions = [index[row].caption or index[row].path for row in shown.rows]
    titles = [caption if len(caption) < 32 else caption[:30] + "…" for caption in captions]
    seen = [shown_rgb(photo, index.pixels(row)) for photo, row in zip(photos, shown.rows, strict=True)]
    pca_maps(seen, feature_maps(tower, photos), path, titles, pairs_per_row=min(3, len(photos)))
