"""Distilled students: a DINOv2 relative and EfficientNet-Lite0 together teach a small ViT and a small ConvNeXt.

On photographs and cut-outs that were held out, by k-NN, by a linear probe, and by a linear map of the foreground
(`docs/headless.md`). The figure is how many of its claims hold.

Settings are fixed in `bench/distil/train.py`. They were chosen on other seeds, and on training pictures alone.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from bench import _claims
from bench.harness import Claim, stopwatch

if TYPE_CHECKING:
    from bench.distil.interval import Asked
    from bench.distil.score import Scores
    from bench.distil.train import Plan
    from bench.learning.finding import Finding, Question

RESULTS = Path(__file__).parents[1] / "results" / "distil.json"
DOCUMENT = Path(__file__).parents[2] / "docs" / "headless.md"
_BEGIN, _END = "<!-- distil measured -->", "<!-- end of distil measured -->"
# What the minutes of the document are of.
_SCOPE = "for all seeds"
# Of the better teacher's score, that a student's foreground has to reach.
_OF_TEACHER = 0.9
# Processor time that a seed may take, of both students and both models from scratch: 15 minutes of two cores.
_MOST_CPU_S = 1800


def run(quick: bool, seeds: int = 3, first_seed: int = 0, work: Path | None = None) -> Claim:
    """Train and score; the full form writes `bench/results/distil.json` and the document's table.

    Args:
        quick: a few steps, which shows that everything works and nothing else.
        seeds: how many.
        first_seed: the first one; the others follow.
        work: a folder that keeps what is trained: the same command goes on after it was stopped. Settings must be the
            same, too. Default: nothing is kept.
    """
    from bench.distil.train import FULL, QUICK
    from bench.learning.report import write_result

    plan = replace(QUICK if quick else FULL, seeds=tuple(range(first_seed, first_seed + seeds)))
    with stopwatch() as seconds, tempfile.TemporaryDirectory() as folder:
        finding = measure(plan, work or Path(folder), None if quick else DOCUMENT.parent)
    if not quick:
        RESULTS.unlink(missing_ok=True)
        write_result(RESULTS, finding, datetime.now(UTC).date().isoformat(), seconds())
        write_document()
    return _claims.of_finding(
        finding, "students of trained teachers beat raw pixels and the same models from scratch"
    )


def measure(plan: Plan, work: Path, pictures: Path | None = None) -> Finding:
    """All seeds, two processes at a time: a core each.

    Args:
        plan: what is trained and asked.
        work: folder of the models.
        pictures: folder for what the models of the first seed see; None draws nothing.
    """
    from bench.distil import scenes, score, train
    from bench.distil.pictures import draw

    _check_settings(work, {"views": plan.views, "every": plan.every, **train.settings(plan)})
    # Before processes share what is fetched and unpacked on first use.
    weights = train.fetch_all()
    scenes.scene_pictures(plan.scenes)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = {}
        for seed in plan.seeds:
            jobs[seed, "distilled"] = pool.submit(train.distilled, weights, plan, seed, work)
            for kind in train.MODELS:
                jobs[seed, f"{kind}, from scratch"] = pool.submit(train.from_scratch, plan, seed, kind, work)
        fixed = pool.submit(score.fixed, weights, plan)
        nets: dict[str, list[Path]] = {}
        cpu_s = dict.fromkeys(plan.seeds, 0.0)
        for (seed, way), job in jobs.items():
            made = job.result()
            cpu_s[seed] += made.cpu_s
            sys.stderr.write(f"{way}, seed {seed}: {made.cpu_s:.0f} CPU seconds in {made.wall_s:.0f} s\n")
            for kind, path in made.folders.items():
                nets.setdefault(f"{kind}, {way}" if way == "distilled" else way, []).append(path)
        scored = pool.submit(score.of_nets, nets, plan)
        if pictures is not None:
            pool.submit(draw, {who: paths[0] for who, paths in nets.items()}, weights, pictures).result()
        return finding(fixed.result() | scored.result(), plan, list(cpu_s.values()))


def _check_settings(work: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError if the folder's models were trained with other settings."""
    from orchestrator.errors import UserError
    from orchestrator.fsio import atomic_write

    record, text = work / "settings.json", json.dumps(settings, sort_keys=True, default=str)
    if record.is_file() and record.read_text(encoding="utf-8") != text:
        raise UserError(f"{work} has models of other settings", where="--work", hint="name another folder")
    work.mkdir(parents=True, exist_ok=True)
    atomic_write(record, text.encode())


def finding(scores: Scores, plan: Plan, cpu_s: Sequence[float]) -> Finding:
    """The claims: each compares means over seeds, and asks for more than the spread of either side.

    Args:
        scores: of everybody.
        plan: what was trained.
        cpu_s: processor time of each seed.
    """
    from bench.distil import score, train
    from bench.distil.interval import values
    from bench.learning.finding import Finding

    questions: list[Question] = []
    arms = {f"{way}: {who}": values(asked) for who, ways in scores.items() for way, asked in ways.items()}
    for kind in train.MODELS:
        ours = scores[f"{kind}, distilled"]
        for way in score.WAYS:
            for other in ("raw pixels", f"{kind}, from scratch"):
                claim = f"{way}: {kind} distilled beats {other}"
                questions.append(beats_the_spread(claim, ours[way], scores[other][way]))
        teacher = max(mean(values(scores[name][score.FOREGROUND])) for name in score.TEACHERS)
        share = mean(values(ours[score.FOREGROUND])) / teacher
        questions.append(
            _question(
                f"{score.FOREGROUND}: {kind} distilled has {_OF_TEACHER:.0%} of the better teacher's",
                share >= _OF_TEACHER,
                f"{share:.1%} of {teacher:.3f}",
            )
        )
    shown = ", ".join(f"{seconds:.0f}" for seconds in cpu_s)
    questions.append(
        _question(
            f"a seed takes at most {_MOST_CPU_S} seconds of processor time", max(cpu_s) <= _MOST_CPU_S, shown
        )
    )
    return Finding("distil", arms, questions, settings={"plan": asdict(plan), **train.settings(plan)})


def beats_the_spread(claim: str, ours: Sequence[Asked], theirs: Sequence[Asked]) -> Question:
    """Whether our mean is above theirs by more than the sample standard deviation of either.

    The detail has 95 % of the gain, too: over other draws of the pictures, and over seeds. They decide nothing.
    """
    from bench.distil.interval import over_pictures, over_seeds, values
    from bench.learning.finding import shown, spread

    first, second = values(ours), values(theirs)
    gain, needed = mean(first) - mean(second), max(spread(first), spread(second))
    ranges = {"pictures": over_pictures(ours, theirs), "seeds": over_seeds(first, second)}
    ends = [f"{low:+.3f} to {high:+.3f} over {what}" for what, (low, high) in _known(ranges).items()]
    detail = f"{shown(first)} against {shown(second)}; gain {gain:+.3f}, 95 %: {' and '.join(ends)}"
    return _question(claim, gain > needed, detail)


def _known(ranges: Mapping[str, tuple[float, float] | None]) -> dict[str, tuple[float, float]]:
    return {what: ends for what, ends in ranges.items() if ends is not None}


def _question(claim: str, holds: bool, detail: str) -> Question:
    from bench.learning.finding import Question

    return Question(claim, holds, detail)


def write_document(results: Path = RESULTS, path: Path = DOCUMENT) -> None:
    """The measured part of the document, from the results."""
    _claims.write_table(results, path, "distil", _BEGIN, _END, scope=_SCOPE)
