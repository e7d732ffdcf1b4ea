"""Dense collapse, and what Gram anchoring from an earlier checkpoint brings back.

With the whole recipe the patch-level score is followed over training: the natural course. Then collapse is induced: the
pretrained tower goes on without iBOT, so that nothing holds the patches, at fifteen times the rate that it was made
with. Nothing milder lowers this score (`docs/experiments.md`), and CLS is spoilt with the patches. From that
checkpoint three arms go on alike in all but the Gram term: none, a teacher at the student's resolution, a teacher at
twice that. The Gram teacher is the tower as it was before the collapse.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from bench.learning import measure
from bench.learning.finding import Finding, Question, beats, shown
from bench.learning.ground import CROPS, HEADS, MODEL, SIZE, Ground, final, snapshots
from bench.learning.lab import Trained
from orchestrator.stages.gram_anchor import GramAnchor
from orchestrator.stages.pretrain import Pretrain

ARMS: dict[str, tuple[float, int | None]] = {
    "no Gram": (0.0, None),
    "Gram 1×": (2.0, None),
    "Gram 2×": (2.0, 2 * SIZE),
}
_RECOVERS = 0.5


def run(ground: Ground) -> Finding:
    """Natural course, induced collapse, three ways on."""
    lab = ground.lab
    bases = lab.each_seed(ground.base)
    collapsed = lab.each(lambda seed, base: _collapse(ground, seed, base), lab.seeds, bases)
    jobs = [(arm, seed, start) for arm in ARMS for seed, start in zip(lab.seeds, collapsed, strict=True)]
    ends = lab.each(lambda *job: _go_on(ground, *job), *zip(*jobs, strict=True))
    of_arm = {arm: [end for job, end in zip(jobs, ends, strict=True) if job[0] == arm] for arm in ARMS}
    stages = {"before": bases, "collapsed": collapsed, **of_arm}
    scores = {name: [ground.patch_score(final(one)) for one in runs] for name, runs in stages.items()}
    arms = {f"patch score, {name}": values for name, values in scores.items()}
    arms |= _health(ground, stages)
    shares = {arm: _recovered(scores, arm) for arm in ARMS}
    arms |= {f"share recovered, {arm}": values for arm, values in shares.items()}
    curves = {
        "patch score, whole recipe": _curve(ground, bases),
        "patch score, without iBOT": _curve(ground, collapsed, after=ground.base_stage.steps),
    }
    return Finding("collapse", arms, _questions(scores, shares, curves), curves, _settings(ground))


def collapse_stage(ground: Ground) -> Pretrain:
    """More pretraining without iBOT."""
    fields = ground.settings(
        60,
        12,
        kind="pretrain",
        model=MODEL,
        heads=HEADS,
        ibot_weight=0.0,
        optimizer={"lr": {"peak": 3e-2, "warmup_steps": 5}},
    )
    return Pretrain.model_validate({**fields, "snapshot_every": fields["steps"] // 3})


def gram_stage(ground: Ground, arm: str) -> GramAnchor:
    """Going on as in the collapse, with an arm's Gram term."""
    weight, size = ARMS[arm]
    return GramAnchor.model_validate(
        ground.settings(
            80,
            10,
            kind="gram_anchor",
            ibot_weight=0.0,
            crops={**CROPS, "gram_size": size},
            optimizer={"lr": {"peak": 2e-3, "warmup_steps": 5}},
            local_weight={"start": 1.0, "peak": 0.5, "warmup_steps": 10},
            gram={"weight": {"peak": weight, "warmup_steps": 10}, "teacher": ground.base_stage.steps},
        )
    )


def _collapse(ground: Ground, seed: int, base: Trained) -> Trained:
    inputs = {"index": ground.index, "backbone": base}
    return ground.lab.train("collapse", collapse_stage(ground), seed, inputs)


def _go_on(ground: Ground, arm: str, seed: int, start: Trained) -> Trained:
    name = arm.lower().replace(" ", "-").replace("×", "x")
    return ground.lab.train(name, gram_stage(ground, arm), seed, {"index": ground.index, "backbone": start})


def _health(ground: Ground, stages: dict[str, list[Trained]]) -> dict[str, list[float]]:
    images = ground.scenes[1].at(SIZE).images
    arms: dict[str, list[float]] = {}
    for name, runs in stages.items():
        for one in runs:
            for figure, value in measure.health(final(one), images).items():
                arms.setdefault(f"{figure.replace('_', ' ')}, {name}", []).append(value)
    return arms


def _recovered(scores: dict[str, list[float]], arm: str) -> list[float]:
    """(arm − collapsed) / (before − collapsed), seed by seed."""
    rows = zip(scores["before"], scores["collapsed"], scores[arm], strict=True)
    return [(end - low) / max(before - low, 1e-6) for before, low, end in rows]


def _curve(ground: Ground, runs: Sequence[Trained], after: int = 0) -> dict[str, list[float]]:
    return {
        str(after + step): [ground.patch_score(measure.snapshot(snapshots(one)[step], MODEL)) for one in runs]
        for step in sorted(snapshots(runs[0]))
    }


def _questions(
    scores: dict[str, list[float]], shares: dict[str, list[float]], curves: dict[str, dict[str, list[float]]]
) -> list[Question]:
    natural = [mean(values) for values in curves["patch score, whole recipe"].values()]
    drop = max(natural) - natural[-1]
    return [
        Question(
            "natural collapse at this size (not expected)", drop > 0.02, f"last is {drop:.3f} below the best"
        ),
        beats("induced: without iBOT the patch-level score falls", scores["before"], scores["collapsed"]),
        *(
            Question(
                f"{arm} recovers at least half of what was lost",
                mean(shares[arm]) >= _RECOVERS,
                shown(shares[arm]),
            )
            for arm in ("Gram 1×", "Gram 2×")
        ),
        beats("Gram 1× beats going on without Gram", scores["Gram 1×"], scores["no Gram"]),
        beats("Gram 2× beats Gram 1×", scores["Gram 2×"], scores["Gram 1×"]),
    ]


def _settings(ground: Ground) -> dict[str, Any]:
    stages = {"collapse": collapse_stage(ground), **{arm: gram_stage(ground, arm) for arm in ARMS}}
    return {name: stage.identity() for name, stage in stages.items()}
