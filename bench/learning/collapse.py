"""Dense collapse, and what Gram anchoring from an earlier checkpoint brings back.

With the whole recipe the score of patches within a picture is followed over training: the natural course. Then
collapse is induced: the pretrained tower goes on without iBOT, so that nothing holds the patches, first at five times
the rate that it was made with and then at that rate (`docs/experiments.md` has what else was tried). From there three
arms go on alike in all but the Gram term: none, a teacher at the student's resolution, a teacher at twice that. The
Gram teacher is the tower as it was before the collapse. The score over pictures is told beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from bench.learning import measure
from bench.learning.finding import Finding, Question, beats
from bench.learning.ground import CROPS, HEADS, MODEL, SIZE, Ground, final, snapshots
from bench.learning.lab import Trained
from orchestrator.models import Backbone
from orchestrator.stages.ssl.gram_anchor import GramAnchor
from orchestrator.stages.ssl.pretrain import Pretrain

ARMS: dict[str, tuple[float, int | None]] = {
    "no Gram": (0.0, None),
    "Gram 1×": (2.0, None),
    "Gram 2×": (2.0, 2 * SIZE),
}
_RECOVERS = 0.5
# Pretrained towers of three seeds are 0.003 apart.
_FELL = 0.005


def run(ground: Ground) -> Finding:
    """Natural course, induced collapse, three ways on."""
    lab = ground.lab
    bases = lab.each_seed(ground.base)
    spoilt = lab.each(lambda seed, base: _spoil(ground, seed, base), lab.seeds, bases)
    collapsed = lab.each(lambda seed, start: _go_on(ground, "no Gram", seed, start), lab.seeds, spoilt)
    jobs = [(arm, seed, start) for arm in ARMS for seed, start in zip(lab.seeds, collapsed, strict=True)]
    ends = lab.each(lambda *job: _go_on(ground, *job), *zip(*jobs, strict=True))
    of_arm = {arm: [end for job, end in zip(jobs, ends, strict=True) if job[0] == arm] for arm in ARMS}
    stages = {"before": bases, "collapsed": collapsed, **of_arm}
    nets = {name: [final(one) for one in runs] for name, runs in stages.items()}
    scores = {name: [ground.within_score(net) for net in of_stage] for name, of_stage in nets.items()}
    random = [ground.within_score(measure.random_net(MODEL, seed)) for seed in lab.seeds]
    arms = {
        f"within a picture, {name}": values for name, values in ({"random weights": random} | scores).items()
    }
    arms |= {
        f"over pictures, {name}": [ground.patch_score(net) for net in of_stage]
        for name, of_stage in nets.items()
    }
    arms |= _health(ground, nets)
    shares = {arm: _recovered(scores, arm) for arm in ARMS}
    arms |= {f"share recovered, {arm}": [share] for arm, share in shares.items()}
    curves = {
        "within a picture, whole recipe": _curve(ground, bases),
        "within a picture, without iBOT": _curve(ground, spoilt, after=ground.base_stage.steps)
        | _curve(ground, collapsed, after=ground.base_stage.steps + spoiling_stage(ground).steps),
    }
    fallen = max(int(step) for step in curves["within a picture, without iBOT"])
    for arm in ARMS:
        points = {str(fallen): scores["collapsed"], str(fallen + gram_stage(ground, arm).steps): scores[arm]}
        curves[f"from there, {arm}"] = points
    return Finding("collapse", arms, _questions(scores, shares, curves), curves, _settings(ground))


def spoiling_stage(ground: Ground) -> Pretrain:
    """More pretraining without iBOT, at a high rate."""
    fields = ground.settings(
        150,
        12,
        kind="pretrain",
        model=MODEL,
        heads=HEADS,
        ibot_weight=0.0,
        optimizer={"lr": {"peak": 1e-2, "warmup_steps": 5}},
    )
    return Pretrain.model_validate({**fields, "snapshot_every": fields["steps"] // 3})


def gram_stage(ground: Ground, arm: str) -> GramAnchor:
    """Going on without iBOT at the rate of pretraining, with an arm's Gram term."""
    weight, size = ARMS[arm]
    return GramAnchor.model_validate(
        ground.settings(
            160,
            10,
            kind="gram_anchor",
            ibot_weight=0.0,
            crops={**CROPS, "gram_size": size},
            optimizer={"lr": {"peak": 2e-3, "warmup_steps": 5}},
            local_weight={"start": 1.0, "peak": 0.5, "warmup_steps": 10},
            gram={"weight": {"peak": weight, "warmup_steps": 10}, "teacher": ground.base_stage.steps},
        )
    )


def _spoil(ground: Ground, seed: int, base: Trained) -> Trained:
    inputs = {"index": ground.index, "backbone": base}
    return ground.lab.train("collapse", spoiling_stage(ground), seed, inputs)


def _go_on(ground: Ground, arm: str, seed: int, start: Trained) -> Trained:
    name = arm.lower().replace(" ", "-").replace("×", "x")
    return ground.lab.train(name, gram_stage(ground, arm), seed, {"index": ground.index, "backbone": start})


def _health(ground: Ground, nets: dict[str, list[Backbone]]) -> dict[str, list[float]]:
    images = ground.scenes[1].at(SIZE).images
    arms: dict[str, list[float]] = {}
    for name, of_stage in nets.items():
        for net in of_stage:
            for figure, value in measure.health(net, images).items():
                arms.setdefault(f"{figure.replace('_', ' ')}, {name}", []).append(value)
    return arms


def _recovered(scores: dict[str, list[float]], arm: str) -> float:
    """(arm − collapsed) / (before − collapsed), of the means: one seed may have lost less than its score is good to."""
    low = mean(scores["collapsed"])
    return (mean(scores[arm]) - low) / max(mean(scores["before"]) - low, 1e-6)


def _curve(ground: Ground, runs: Sequence[Trained], after: int = 0) -> dict[str, list[float]]:
    return {
        str(after + step): [
            ground.within_score(measure.snapshot(snapshots(one)[step], MODEL)) for one in runs
        ]
        for step in sorted(snapshots(runs[0]))
    }


def _questions(
    scores: dict[str, list[float]], shares: dict[str, float], curves: dict[str, dict[str, list[float]]]
) -> list[Question]:
    natural = [mean(values) for values in curves["within a picture, whole recipe"].values()]
    drop = max(natural) - natural[-1]
    return [
        Question(
            "natural collapse at this size (not expected)", drop > _FELL, f"last is {drop:.3f} below the best"
        ),
        beats("induced: without iBOT the patch-level score falls", scores["before"], scores["collapsed"]),
        *(
            Question(
                f"{arm} recovers at least half of what was lost",
                shares[arm] >= _RECOVERS,
                f"{shares[arm]:.0%}",
            )
            for arm in ("Gram 1×", "Gram 2×")
        ),
        beats("Gram 1× beats going on without Gram", scores["Gram 1×"], scores["no Gram"]),
        beats("Gram 2× beats Gram 1×", scores["Gram 2×"], scores["Gram 1×"]),
    ]


def _settings(ground: Ground) -> dict[str, Any]:
    stages = {"collapse": spoiling_stage(ground), **{arm: gram_stage(ground, arm) for arm in ARMS}}
    return {name: stage.identity() for name, stage in stages.items()}
