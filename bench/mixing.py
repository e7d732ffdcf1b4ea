"""Training draws about as many clusters, in effect, as the curation chose, and what it left out only where it is named.

A pool of photographs whose 100 clusters have sizes after Zipf's law is sampled by the curation's own code and drawn by
the sample order of a file's `pretrain` stage. Clusters in effect are exp(entropy). The arm `before` is the rule that
this project had until then: a tenth of the batches from what was chosen, the others from what was left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from bench.harness import Claim, summarize
from orchestrator.data.curation import selection
from orchestrator.data.curation.components import CHOSEN, LEFT_OUT
from orchestrator.data.curation.hierarchy import Hierarchy, draw
from orchestrator.data.curation.mix import by_cluster, count_draws, effective_number
from orchestrator.data.index import ImageIndex
from orchestrator.data.sampler import SampleOrder
from orchestrator.data.sources.scan import ScannedImage
from orchestrator.evaluation.report.clusters import cluster_shares
from orchestrator.pipeline.load import load
from orchestrator.stages.curate.config import Curate
from orchestrator.stages.ssl.pretrain import Pretrain

FILES = {
    "7B": Path("conf/paper/dinov3_7b.yaml"),
    "laptop": Path("conf/full_pipeline.yaml"),
}
NUM_CLUSTERS = 100
_ROOT = Path(__file__).parents[1]
_NUM_PHOTOS, _BATCH, _STEPS = 100_000, 256, 2000
_GOAL = 0.95


def run(quick: bool, picture: Path | None = None) -> Claim:
    """Three seeds of each file's draws, one in the quick run; `picture` is a PNG to write of the first."""
    panels: dict[str, dict[str, list[int]]] = {}
    arms: dict[str, list[float]] = {}
    for name, file in FILES.items():
        for seed in range(1 if quick else 3):
            counted = _draw(_ROOT / file, seed, 10_000 if quick else _NUM_PHOTOS)
            for arm, counts in counted.items():
                arms.setdefault(f"{arm}, {name}", []).append(effective_number(counts))
            if seed == 0:
                panels |= _panels(name, counted)
    if picture is not None:
        cluster_shares(panels, picture, columns=2)
    now = {name: min(arms[f"drawn, {name}"]) / max(arms[f"chosen, {name}"]) for name in FILES}
    return Claim(
        claim="clusters in effect that training draws, over those that the curation chose; the worse of two files",
        figure=min(now.values()),
        unit="of 1",
        goal=_GOAL,
        limit=None,
        arms={name: summarize(values) for name, values in arms.items()},
        notes=(
            f"arms are clusters in effect, of {NUM_CLUSTERS}; a range is over seeds of the curation and of the draws",
            "what the 7B's file draws beside what was chosen is its homogeneous tenth, all photos of `imagenet`, which "
            "are made to follow the pool's Zipf law here",
        ),
        better="more",
    )


def zipf_index(
    folder: Path, sample: float, sources: Sequence[str], num_photos: int, seed: int = 0
) -> ImageIndex:
    """A pool whose clusters' sizes follow Zipf's law, sampled by the curation's own code.

    All rows are of one file, `one.png` in `folder`, which is not made. Every twentieth photo is of the first source,
    the others are of the last.
    """
    shares = 1 / np.arange(1, NUM_CLUSTERS + 1)
    sizes = np.round(num_photos * shares / shares.sum()).astype(int)
    clusters_N = np.random.default_rng(seed).permutation(np.repeat(np.arange(NUM_CLUSTERS), sizes))
    levels = Hierarchy((clusters_N,), np.zeros(len(clusters_N)), ())
    chosen_N = draw(levels, round(sample * len(clusters_N)), seed)
    statuses = [
        selection.ImageStatus(
            ScannedImage(sources[0] if number % 20 == 0 else sources[-1], "one.png", "", 1, 8, 8),
            str(folder),
            "unique",
        )
        for number in range(len(clusters_N))
    ]
    return ImageIndex(selection.index_rows(statuses, clusters_N, chosen_N))


def _draw(file: Path, seed: int, num_photos: int) -> dict[str, list[int]]:
    """Photos or draws by cluster: of the pool, of what was chosen, and by the rule before and the file's own."""
    stages = load(file, needs_data=False).spec.stages
    curate, stage = cast("Curate", stages["curate"]), cast("Pretrain", stages["pretrain"])
    index = zipf_index(Path(), float(curate.sample), curate.data_sources(), num_photos, seed)
    chosen, left_out = index.rows_of(CHOSEN), index.rows_of(LEFT_OUT)
    before = SampleOrder({LEFT_OUT: left_out}, None, (chosen, 0.1), batch_size=_BATCH, seed=seed)
    rows = {
        "raw": np.ones(len(index), dtype=np.int64),
        "chosen": np.bincount(chosen, minlength=len(index)),
        "drawn before": count_draws(index, before, _STEPS),
        "drawn": count_draws(index, stage.sample_order(index, _BATCH, seed), _STEPS),
    }
    return {name: _counts(index, rows_N) for name, rows_N in rows.items()}


def _counts(index: ImageIndex, rows_N: NDArray[np.int64]) -> list[int]:
    return list(by_cluster(index.clusters, rows_N).values())


def _panels(name: str, counted: dict[str, list[int]]) -> dict[str, dict[str, list[int]]]:
    """What a file drew before and draws now, beside the pool and what was chosen."""
    return {
        f"{name} file, {title}": {
            f"{label}: {effective_number(counted[arm]):.1f} of {NUM_CLUSTERS} clusters in effect": counted[
                arm
            ]
            for label, arm in (("raw", "raw"), ("chosen", "chosen"), ("drawn", drawn))
        }
        for title, drawn in (("before", "drawn before"), ("now", "drawn"))
    }
