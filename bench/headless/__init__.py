"""Headless teacher: EfficientNet-Lite0 distilled into a ViT and a ConvNeXt beats the same towers from scratch.

On food photographs and clip art, by k-NN (`docs/headless.md`). The figure is how many of its claims hold.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bench import _claims
from bench.harness import Claim, stopwatch

if TYPE_CHECKING:
    from bench.headless.train import Plan
    from bench.learning.finding import Finding

RESULTS = Path(__file__).parents[1] / "results" / "headless.json"
DOCUMENT = Path(__file__).parents[2] / "docs" / "headless.md"
_BEGIN, _END = "<!-- measured -->", "<!-- end of measured -->"


def run(quick: bool, seeds: int | None = None) -> Claim:
    """Train all students and lone towers on two cores; the full form writes its results and the document's table.

    Args:
        quick: a few steps of one seed, which shows that everything works and nothing else.
        seeds: of each tower; default: three, or one if quick.
    """
    from bench.headless.train import FULL, QUICK
    from bench.learning.report import write_result

    with stopwatch() as seconds:
        plan = QUICK if quick else FULL
        finding = measure(replace(plan, seeds=seeds or plan.seeds))
    if not quick:
        RESULTS.unlink(missing_ok=True)
        write_result(RESULTS, finding, datetime.now(UTC).date().isoformat(), seconds())
        write_document()
    return _claims.of_finding(finding, "towers learn more from a headless teacher than by themselves")


def measure(plan: Plan) -> Finding:
    """Train and score. One process distils, the other trains from scratch, and whoever is done first helps."""
    from bench._lite0 import lite0_weights
    from bench.headless import score, train

    weights = lite0_weights()
    rows = score.training_rows()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        taught = pool.submit(train.distilled, rows, weights, plan)
        lone = {
            kind: [pool.submit(train.alone, rows, model, seed, plan) for seed in range(plan.seeds)]
            for kind, model in train.MODELS.items()
        }
        exams = {name: pool.submit(score.exam, name, plan.every) for name in score.SETS}
        fixed = {name: pool.submit(score.fixed, exams[name].result(), weights) for name in exams}
        nets = {f"{kind}, from scratch": [one.result() for one in made] for kind, made in lone.items()}
        for kind, model in train.MODELS.items():
            nets[f"{kind}, distilled"] = [taught.result()[f"{model}-{seed}"] for seed in range(plan.seeds)]
        arms = _arms(
            {name: found.result() for name, found in fixed.items()},
            {name: score.of_towers(found.result(), nets) for name, found in exams.items()},
        )
    return _finding(arms, plan)


def _arms(*scores: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> dict[str, list[float]]:
    """Set → who → way of asking → values, as arms by name."""
    return {
        f"{name}, {way}: {who}": list(values)
        for found in scores
        for name, by_who in found.items()
        for who, by_way in by_who.items()
        for way, values in by_way.items()
    }


def _finding(arms: Mapping[str, list[float]], plan: Plan) -> Finding:
    from bench.headless import score, train
    from bench.learning.finding import Finding, beats

    questions = []
    for name in score.SETS:
        for kind in train.MODELS:
            ours, theirs = (
                arms[f"{name}, leave one out: {kind}, {way}"] for way in ("distilled", "from scratch")
            )
            questions.append(beats(f"{name}: {kind} distilled beats {kind} from scratch", ours, theirs))
            raw = arms[f"{name}, leave one out: raw pixels"] * len(ours)
            questions.append(beats(f"{name}: {kind} distilled beats raw pixels", ours, raw))
    settings = {
        "plan": asdict(plan),
        "distilled": train.distill_config(plan).identity(),
        "from scratch": {
            model: train.alone_config(model, plan).identity() for model in train.MODELS.values()
        },
    }
    return Finding("headless", arms, questions, settings=settings)


def write_document(results: Path = RESULTS, path: Path = DOCUMENT) -> None:
    """The measured part of the document, from the results."""
    _claims.write_table(results, path, "headless", _BEGIN, _END)
