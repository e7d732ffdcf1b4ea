"""Distilled students: a DINOv2 relative and EfficientNet-Lite0 together teach a small ViT and a small ConvNeXt.

On photographs and cut-outs that were held out, by k-NN, by a linear probe, and by a linear map of the foreground
(`docs/headless.md`). The figure is how many of its claims hold.

Settings are fixed in `bench/distil/train.py`; they were not chosen on seeds that are reported.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from bench.harness import Claim, stopwatch, summarize

if TYPE_CHECKING:
    from bench.distil.score import Scores
    from bench.distil.train import Plan
    from bench.learning.finding import Finding, Question

RESULTS = Path(__file__).parents[1] / "results" / "distil.json"
# Of the better teacher's score, that a student's foreground has to reach.
_OF_TEACHER = 0.9


def run(quick: bool, seeds: int = 3, first_seed: int = 0) -> Claim:
    """Train and score; the full form writes `bench/results/distil.json`.

    Args:
        quick: a few steps, which shows that everything works and nothing else.
        seeds: how many.
        first_seed: the first one; the others follow.
    """
    from bench.distil.train import FULL, QUICK
    from bench.learning.report import write_result

    plan = replace(QUICK if quick else FULL, seeds=tuple(range(first_seed, first_seed + seeds)))
    with stopwatch() as seconds:
        finding = measure(plan)
    if not quick:
        RESULTS.unlink(missing_ok=True)
        write_result(RESULTS, finding, datetime.now(UTC).date().isoformat(), seconds())
    return Claim(
        claim="students of trained teachers beat raw pixels and the same models from scratch",
        figure=sum(question.holds for question in finding.questions),
        unit="claims that hold",
        goal=len(finding.questions),
        limit=len(finding.questions),
        arms={arm: summarize(values) for arm, values in finding.arms.items()},
        notes=[f"{'✓' if q.holds else '✗'} {q.claim}: {q.detail}" for q in finding.questions],
        better="more",
    )


def measure(plan: Plan) -> Finding:
    """All seeds, two processes at a time: a core each."""
    from bench.distil import score, train

    # Before processes share what is fetched and unpacked on first use.
    weights = train.fetch_all()
    score.wallpapers()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        fixed = pool.submit(score.fixed, weights, plan)
        jobs = {}
        for seed in plan.seeds:
            jobs[seed, "distilled"] = pool.submit(train.distilled, weights, plan, seed)
            for kind, model in train.MODELS.items():
                jobs[seed, f"{kind}, from scratch"] = pool.submit(train.from_scratch, plan, seed, model)
        nets: dict[str, list[Path]] = {}
        for (seed, way), job in jobs.items():
            found, wall_s = job.result()
            sys.stderr.write(f"{way}, seed {seed}: {wall_s:.0f} s\n")
            for kind, path in found.items():
                nets.setdefault(f"{kind}, {way}" if way == "distilled" else way, []).append(path)
        scored = pool.submit(score.of_nets, nets, plan)
        return finding(fixed.result() | scored.result(), plan)


def finding(scores: Scores, plan: Plan) -> Finding:
    """The claims: each compares means over seeds, and asks for more than the spread of either side."""
    from bench.distil import score, train
    from bench.learning.finding import Finding

    questions: list[Question] = []
    arms = {f"{way}: {who}": values for who, ways in scores.items() for way, values in ways.items()}
    for kind in train.MODELS:
        ours = scores[f"{kind}, distilled"]
        for way in score.WAYS:
            for other in ("raw pixels", f"{kind}, from scratch"):
                claim = f"{way}: {kind} distilled beats {other}"
                questions.append(beats_the_spread(claim, ours[way], scores[other][way]))
        teacher = max(mean(scores[name][score.FOREGROUND]) for name in score.TEACHERS)
        share = mean(ours[score.FOREGROUND]) / teacher
        questions.append(
            _question(
                f"{score.FOREGROUND}: {kind} distilled has {_OF_TEACHER:.0%} of the better teacher's",
                share >= _OF_TEACHER,
                f"{share:.1%} of {teacher:.3f}",
            )
        )
    return Finding("distil", arms, questions, settings={"plan": asdict(plan), **train.settings(plan)})


def beats_the_spread(claim: str, ours: Sequence[float], theirs: Sequence[float]) -> Question:
    """Whether our mean is above theirs by more than the sample standard deviation of either."""
    from bench.learning.finding import shown, spread

    gain, needed = mean(ours) - mean(theirs), max(spread(ours), spread(theirs))
    return _question(claim, gain > needed, f"{shown(ours)} against {shown(theirs)}; gain {gain:+.3f}")


def _question(claim: str, holds: bool, detail: str) -> Question:
    from bench.learning.finding import Question

    return Question(claim, holds, detail)


def table(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Markdown: a row for each model, a column for each way of asking."""
    from bench.learning.finding import shown

    columns = list(next(iter(scores.values())))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for who, ways in scores.items():
        cells = [shown(ways[way]) if len(ways[way]) > 1 else f"{ways[way][0]:.3f}" for way in columns]
        lines.append(f"| {who} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
