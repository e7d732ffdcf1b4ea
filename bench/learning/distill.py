"""A distilled student beats the same student trained alone: same steps, batch and crops, so same student compute."""

from __future__ import annotations

from typing import Any

from bench.learning import measure
from bench.learning.finding import Finding, beats
from bench.learning.ground import POOL, TEMPERATURE, Ground, final
from bench.learning.lab import Trained
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.ssl.pretrain import Pretrain

STUDENT = "vit_femto"
_STEPS, _QUICK_STEPS = 300, 12


def run(ground: Ground) -> Finding:
    """Both ways for every seed; the teacher is the pretrained tower of the same seed."""
    lab = ground.lab
    bases = lab.each_seed(ground.base)
    jobs = [
        (way, seed, base)
        for way in ("distilled", "alone")
        for seed, base in zip(lab.seeds, bases, strict=True)
    ]
    ends = lab.each(lambda *job: _train(ground, *job), *zip(*jobs, strict=True))
    nets = {
        "random weights": [measure.random_net(STUDENT, seed) for seed in lab.seeds],
        "alone": [final(end, STUDENT) for (way, *_), end in zip(jobs, ends, strict=True) if way == "alone"],
        "distilled": [_student(end) for (way, *_), end in zip(jobs, ends, strict=True) if way == "distilled"],
        "teacher": [final(base) for base in bases],
    }
    arms = {}
    for name in POOL:
        bank, queries = ground.knn_pictures(name)
        for way, of_way in nets.items():
            arms[f"{name}: {way}"] = [measure.knn(bank, queries, net) for net in of_way]
    for way, of_way in nets.items():
        arms[f"patch score: {way}"] = [ground.patch_score(net) for net in of_way]
    asked = [
        beats(f"{name}: distilled beats alone", arms[f"{name}: distilled"], arms[f"{name}: alone"])
        for name in (*POOL, "patch score")
    ]
    return Finding("distill", arms, asked, settings=_settings(ground))


def distill_stage(ground: Ground) -> Distill:
    """The student beside its frozen teacher."""
    alone = alone_stage(ground)
    fields = ground.settings(
        _STEPS,
        _QUICK_STEPS,
        kind="distill",
        students={"student": {"model": STUDENT}},
        optimizer=alone.optimizer,
    )
    del fields["zero_stage"]
    return Distill.model_validate({**fields, "ema": alone.ema, "teacher_temperature": TEMPERATURE})


def alone_stage(ground: Ground) -> Pretrain:
    """The student by itself: its own EMA teaches it."""
    return ground.from_nothing(STUDENT, _STEPS, _QUICK_STEPS)


def _train(ground: Ground, way: str, seed: int, base: Trained) -> Trained:
    if way == "alone":
        return ground.lab.train("alone", alone_stage(ground), seed, {"index": ground.index})
    return ground.lab.train("distill", distill_stage(ground), seed, {"index": ground.index, "teacher": base})


def _student(trained: Trained) -> Any:
    from orchestrator.models import load_pretrained

    return load_pretrained(trained.path / "students" / "student" / "model")


def _settings(ground: Ground) -> dict[str, Any]:
    return {"distilled": distill_stage(ground).identity(), "alone": alone_stage(ground).identity()}
