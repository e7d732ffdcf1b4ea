"""Text alignment on a locked tower: retrieval of held-out pictures by their captions, and of captions by pictures."""

from __future__ import annotations

from pathlib import Path

from bench.learning.finding import Finding, Question, beats
from bench.learning.ground import SIZE, Ground
from bench.learning.lab import Trained
from orchestrator.data.decode import read_rgb
from orchestrator.evaluation.metrics.retrieval import chance, retrieval_hits
from orchestrator.stages.align_text.config import AlignText

POOLS = {"CLS and patches": "cls_and_patches", "CLS only": "cls"}
_AT = 10


def run(ground: Ground) -> Finding:
    """Both variants for every seed."""
    lab = ground.lab
    bases = lab.each_seed(ground.base)
    jobs = [(way, seed, base) for way in POOLS for seed, base in zip(lab.seeds, bases, strict=True)]
    ends = lab.each(lambda *job: _train(ground, *job), *zip(*jobs, strict=True))
    arms: dict[str, list[float]] = {}
    for (way, *_), end in zip(jobs, ends, strict=True):
        recall = _recall(ground, end)
        for direction in ("image_to_text", "text_to_image"):
            arms.setdefault(f"{direction.replace('_', ' ')}: {way}", []).append(
                recall[f"{direction}_recall_at_{_AT}"]
            )
        arms.setdefault("chance", []).append(recall[f"chance_recall_at_{_AT}"])
    arms["chance"] = arms["chance"][: len(lab.seeds)]
    asked: list[Question] = []
    for direction in ("image to text", "text to image"):
        ours = arms[f"{direction}: CLS and patches"]
        asked.append(beats(f"{direction}: three times chance", ours, [3 * value for value in arms["chance"]]))
        asked.append(beats(f"{direction}: beats CLS only", ours, arms[f"{direction}: CLS only"]))
    settings = {way: text_stage(ground, pool).identity() for way, pool in POOLS.items()}
    return Finding("text", arms, asked, settings=settings)


def text_stage(ground: Ground, pool: str) -> AlignText:
    """The stage, with what its image embedding is made of."""
    return AlignText.model_validate(
        {
            "kind": "align_text",
            "steps": 10 if ground.lab.quick else 150,
            "batch_size": 128,
            "block_size": 64,
            "image_size": SIZE,
            "pool": pool,
            "text": {"dim": 128, "depth": 3, "num_heads": 2},
            "context": 32,
            "vocab_size": 2048,
            "drop_path": 0.1,
            "optimizer": {
                "lr": {"peak": 1e-3, "warmup_steps": 10 if ground.lab.quick else 20, "shape": "cosine"},
                "weight_decay": 1e-4,
            },
            "zero_stage": 1,
        }
    )


def _train(ground: Ground, way: str, seed: int, base: Trained) -> Trained:
    name = f"text-{POOLS[way]}"
    return ground.lab.train(
        name, text_stage(ground, POOLS[way]), seed, {"index": ground.index, "tower": base}
    )


def _recall(ground: Ground, trained: Trained) -> dict[str, float]:
    from orchestrator.stages.common.aligned import load_aligned

    aligned = load_aligned(trained.path / "aligned")
    rows = [row for row in ground.pool[1] if row.caption]
    images = aligned.embed_images([read_rgb(Path(row.root) / row.path) for row in rows])
    captions = [str(row.caption) for row in rows]
    hits = retrieval_hits(images, aligned.embed_texts(captions), captions, (1, _AT))
    recalls = {name: float(hits_N.mean()) for name, hits_N in hits.items()}
    return recalls | {f"chance_recall_at_{k}": chance(captions, k) for k in (1, _AT)}
